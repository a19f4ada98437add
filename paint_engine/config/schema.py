"""The configuration of a run, and the checks on keys that depend on each other.

The sections: `sections.py`. From and to TOML: `toml.py`. Presets, files and the command line:
`command_line.py`. What a recipe reads: the recipe's own file.
"""

from importlib import import_module

from pydantic import model_validator

from paint_engine.config import templates
from paint_engine.config.sections import (
    CheckpointSection,
    DataSection,
    EvalSection,
    GrpoSection,
    LoraSection,
    MaskingSection,
    ModelSection,
    ObjectiveSection,
    OptimSection,
    ParallelSection,
    PromptsSection,
    RewardSection,
    RolloutSection,
    RunSection,
    Section,
    TeacherSection,
    TrainSection,
)


def evaluation_prompts(prompts: PromptsSection, section: EvalSection) -> PromptsSection:
    """Returns the prompts with the message that `eval.prompt` names."""
    if section.prompt == "student":
        return prompts
    return prompts.model_copy(update={"student_template": templates.OPSD_EVALUATION})


class Config(Section):
    """One run. Stages below `training` and `estimate` take the sections that they need."""

    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    prompts: PromptsSection = PromptsSection()
    masking: MaskingSection = MaskingSection()
    rollout: RolloutSection = RolloutSection()
    teacher: TeacherSection = TeacherSection()
    objective: ObjectiveSection = ObjectiveSection()
    grpo: GrpoSection = GrpoSection()
    reward: RewardSection = RewardSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    run: RunSection = RunSection()

    @property
    def eval_prompts(self) -> PromptsSection:
        """The prompts of evaluations: those of training, but for a message of their own."""
        return evaluation_prompts(self.prompts, self.eval)

    @model_validator(mode="after")
    def _check_fields_against_each_other(self) -> "Config":
        wrong, correct = self.masking.rho_wrong, self.masking.rho_correct
        if correct < wrong:
            raise ValueError(
                f"masking.rho_correct: got {correct} with masking.rho_wrong {wrong}; needs at "
                "least rho_wrong, since more overlap hides more (Eq. 5); swap them or set both "
                "to one value"
            )
        if self.optim.warmup_steps > self.train.num_steps:
            raise ValueError(
                f"optim.warmup_steps: got {self.optim.warmup_steps} with train.num_steps "
                f"{self.train.num_steps}; needs at most that many; lower it or train longer"
            )
        if self.eval.final is not None and not self.eval.at_end:
            samples, tokens = self.eval.final_num_samples, self.eval.final_max_new_tokens
            raise ValueError(
                f"eval.at_end: got false with eval.final_num_samples {samples or 'none'} and "
                f"eval.final_max_new_tokens {tokens or 'none'}; needs true, since the full "
                "protocol follows the evaluation after the last step; leave these keys out, or "
                "set --eval.at_end true"
            )
        self._check_evaluations_engine()
        self._check_rollouts()
        if self.parallel.replicas > 1 and self.parallel.shard != "full":
            raise ValueError(
                f"parallel.replicas: got {self.parallel.replicas} with parallel.shard "
                f"{self.parallel.shard!r}, which holds all weights on every rank; needs sharded "
                "weights; set --parallel.shard full, or leave parallel.replicas out"
            )
        if self.run.auto_resume and (self.run.dir is None or self.run.overwrite):
            raise ValueError(
                f"run.auto_resume: got true with run.dir {self.run.dir} and run.overwrite "
                f"{str(self.run.overwrite).lower()}; needs a directory that can be resumed, "
                "not overwritten; give --run.dir, and leave out --run.overwrite"
            )
        if self.run.push_to_hub is not None and not self.lora.enabled:
            raise ValueError(
                f"run.push_to_hub: got {self.run.push_to_hub} with lora.enabled false; it pushes "
                "adapters only; leave it out, and push what paint_engine.export writes"
            )
        # Imported by name, because recipes are a layer above the configuration.
        import_module("paint_engine.recipes").recipe_of(self).check()
        return self

    def _check_evaluations_engine(self) -> None:
        share, size = self.eval.gpu_memory_utilization, self.rollout.tensor_parallel_size
        if share is None and self.eval.max_concurrent is not None:
            raise ValueError(
                f"eval.max_concurrent: got {self.eval.max_concurrent} without "
                "eval.gpu_memory_utilization, where the rollouts' engine answers with "
                "rollout.max_sequences; set a share for an engine of the evaluations' own, or "
                "leave this key out"
            )
        has_own = share is not None and self.eval.enabled and self.rollout.url is None
        if has_own and self.rollout.engine != "builtin" and size > 1:
            raise ValueError(
                f"eval.gpu_memory_utilization: got {share} with rollout.tensor_parallel_size "
                f"{size}; an engine over several ranks lives in their processes and cannot end "
                "for another one; needs --rollout.tensor_parallel_size 1, or "
                "--eval.gpu_memory_utilization none"
            )

    def _check_rollouts(self) -> None:
        rollout = self.rollout
        if rollout.engine == "builtin" and (rollout.ahead or rollout.url):
            urls = ",".join(rollout.url or ())
            given = "rollout.ahead 1" if rollout.ahead else f"rollout.url {urls}"
            raise ValueError(
                f"rollout.engine: got 'builtin' with {given}; the built-in sampler uses the "
                "weights that are being trained, in this process; needs vLLM: set --rollout.engine "
                "vllm (the preset tiny has 'builtin'), or leave out the other key"
            )
        if rollout.url is not None and rollout.tensor_parallel_size > 1:
            raise ValueError(
                f"rollout.tensor_parallel_size: got {rollout.tensor_parallel_size} with "
                "rollout.url; a server has its own --tensor-parallel-size; leave this key out"
            )
        if rollout.url is not None and not self.lora.enabled:
            raise ValueError(
                "rollout.url: got a server with lora.enabled false; a server takes adapters "
                "only; leave out rollout.url, or train adapters"
            )
