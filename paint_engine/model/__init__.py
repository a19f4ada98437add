"""The model: loading, LoRA, sharding, packed sequences and their attention, forward passes to
hidden states, and the teachers."""

from paint_engine.model.forward import (
    autocast,
    causal_lm,
    compute_dtype,
    hidden_states,
    lm_head_weight,
    max_context,
)
from paint_engine.model.load import (
    hub_commit,
    is_on_hub,
    load_base,
    meta_model,
    pick_device,
    resolve_model,
)
from paint_engine.model.lora import add_lora
from paint_engine.model.teachers import EmaTeacher, FixedTeacher, Teacher, make_teacher
from paint_engine.model.tokenizer import check_vocabulary, load_tokenizer, vocabulary_size

__all__ = [
    "EmaTeacher",
    "FixedTeacher",
    "Teacher",
    "add_lora",
    "autocast",
    "causal_lm",
    "check_vocabulary",
    "compute_dtype",
    "hidden_states",
    "hub_commit",
    "is_on_hub",
    "lm_head_weight",
    "load_base",
    "load_tokenizer",
    "make_teacher",
    "max_context",
    "meta_model",
    "pick_device",
    "resolve_model",
    "vocabulary_size",
]
