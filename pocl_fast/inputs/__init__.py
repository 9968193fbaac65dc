"""What a user gives to train with, checked and made ready before anything runs: models, tokenizers, adapters.

Does not know samples, nor how a student is trained."""
