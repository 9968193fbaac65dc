"""Models made ready to be teachers, for the tests of several rooms."""

from pocl_fast.models.packed_attention import enable_packing


def ready(model):
    enable_packing(model)
    return model


def lengths_of_calls(model):
    """The tokens of each call of a model's body from now on."""
    tokens = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return tokens
