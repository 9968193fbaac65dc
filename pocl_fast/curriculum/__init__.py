"""From measured difficulty to an order of the samples, and from that order to the steps of a training.

Knows engines and likelihoods, but not how a step is trained."""
