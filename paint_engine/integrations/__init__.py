"""`paint_loss` in other trainers: Hugging Face's `Trainer`, TRL's trainers, packed batches.

Import the module of your trainer: it imports the library that it extends. This package imports
none.
"""
