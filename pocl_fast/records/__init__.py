"""Records as people have them, and the samples that they say. Knows no tokenizer and no model."""
