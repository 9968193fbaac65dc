"""The student: cut out of a larger model, and made ready to train.

Does not know its teacher, nor how it is trained."""
