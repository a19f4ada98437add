"""The laptop's problem domain: word problems, their tokenizer and a small pretrained base."""
