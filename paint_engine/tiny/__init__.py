"""The laptop's problem domain: generated word problems, their tokenizer, and the pretraining of a
small base model and of a stronger teacher for it."""
