"""From measured difficulty to an order of the samples to the steps of a training.

Does not know how a step is trained."""
