"""PAINT: on-policy self-distillation with partially revealed solutions."""
