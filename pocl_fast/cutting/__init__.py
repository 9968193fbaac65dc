"""A student cut from a larger model: which layers it keeps, and the proof that it is right. Does not know training."""
