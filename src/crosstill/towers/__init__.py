"""Hugging Face towers: the transformers that teachers and students are both made of."""
