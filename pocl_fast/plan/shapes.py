"""The models of a run by their configurations: made on the meta device, where weights have sizes and no memory.

Knows how options name models. Does not know what they cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pocl_fast.cutting.cut import chosen_layers, stack_of
from pocl_fast.cutting.cut_check import differences
from pocl_fast.cutting.cut_settings import Settings
from pocl_fast.inputs.adapters import configuration_of, named_by, with_adapters
from pocl_fast.inputs.vocabulary import rows_of
from pocl_fast.models.loading import readable_errors, resolve
from pocl_fast.models.parameters import as_trainable, num_parameters
from pocl_fast.options.run import RunConfig
from pocl_fast.run_directory.step_inputs import warms_up
from pocl_fast.system.errors import InputError


@dataclass(frozen=True)
class ModelPlan:
    """A model in numbers, by its configuration alone."""

    source: str
    family: str  # the class of transformers
    parameters: int  # tied weights once
    trained: int  # of the adapters where there are any; 0 for a teacher
    layers: int
    hidden_size: int
    vocabulary_rows: int  # of the lm_head
    lm_head_parameters: int
    tied: bool  # whether the lm_head is the embedding


def model_plan(source: str, model: Any, *, whole: int | None = None) -> ModelPlan:
    """The numbers of a model on the meta device; `whole`, the parameters without adapters, where it has some."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, head = inner.config.get_text_config(decoder=True), inner.get_output_embeddings()
    return ModelPlan(
        source=source,
        family=type(inner).__name__,
        parameters=whole or num_parameters(inner),
        trained=sum(p.numel() for p in distinct(model) if p.requires_grad),
        layers=int(config.num_hidden_layers),
        hidden_size=int(head.weight.shape[1]),
        vocabulary_rows=rows_of(inner).lm_head,
        lm_head_parameters=sum(p.numel() for p in head.parameters()),
        tied=head.weight is inner.get_input_embeddings().weight,
    )


def distinct(model: nn.Module) -> list[nn.Parameter]:
    """The parameters, tied ones once."""
    return list({id(p): p for p in model.parameters()}.values())


def empty_model(source: str, *, trust_remote_code: bool = False) -> Any:
    """The model behind a source on the meta device; of a GGUF file by its header, of adapters their base, in which they
    are merged. Raises `InputError` where its configuration alone does not make one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    where = resolve(source)
    of_file = {"gguf_file": where.gguf_file} if where.gguf_file else {}
    with readable_errors(source, "model"):
        config = AutoConfig.from_pretrained(where.path, trust_remote_code=trust_remote_code, **of_file)
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(f"{source} is quantised: its configuration does not say what its weights take")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code, attn_implementation="eager"
            )
    model.name_or_path = str(where.path) if where.is_plain else ""  # as a loaded one: what adapters for it will name
    return model.requires_grad_(False).eval()


def empty_student(config: RunConfig, teacher: Any) -> tuple[Any, int]:
    """The student on the meta device, cut and with its adapters as the options say, and its parameters without these.
    `teacher` is that of the run, from which it is cut where no student is named."""
    chosen = config.models
    if chosen.student is not None:
        model = empty_model(chosen.student, trust_remote_code=chosen.trust_remote_code)
    else:
        model = teacher
    if chosen.student_layers is not None:
        model = cut_on_meta(model, chosen.student_layers)
    whole = num_parameters(model)
    if warms_up(config):
        model.name_or_path = ""  # its source's, which it is not any more
    adapters = configuration_of(config.adapters)
    if adapters is None:
        return as_trainable(model), whole
    return with_adapters(model, adapters, named_by(config.adapters)), whole


def cut_on_meta(model: Any, keep: int) -> Any:
    """A model of `keep` layers as `cut_layers` makes it, on the meta device: the likeliest configuration whose layers
    are what they were. Raises `InputError` where there is none."""
    stack, chosen = stack_of(model), chosen_layers(model, keep)
    settings = Settings(model.config, len(stack.layers), chosen)
    for changes in settings.candidates():
        try:
            with torch.device("meta"):
                small = type(model)(settings.build(changes)).eval()
            layers = small.get_submodule(stack.name)
        except Exception:  # whatever a family's own checks raise
            continue
        pairs = zip(layers, (stack.layers[old] for old in chosen), strict=False)
        if len(layers) == keep and not any(any(differences(new, old)) for new, old in pairs):
            small.name_or_path = ""  # its source's, which it is not
            return small
    raise InputError(
        f"the configuration of {type(model).__name__} alone does not say what {keep} of its layers are: `distill` finds"
        " out once it has loaded the model"
    )
