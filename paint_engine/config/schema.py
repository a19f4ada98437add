"""The configuration of a run, and the checks on keys that depend on each other.

The sections: `config_sections.py`. From and to TOML: `config_toml.py`. Presets, files and the
command line: `cli.py`.
"""

from pydantic import model_validator

from paint_engine.config.sections import (
    INSTRUCTION,
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

# Keys of [objective] that "paint" alone has a use for.
_PAINT_ALONE = (
    *("divergence", "pointwise_clip", "top_fraction", "interpolation_weight", "entropy_floor"),
    "teacher_top_k",
)
# What switches such a part off, and so says nothing wrong of an objective that lacks it.
_SWITCHED_OFF = {"pointwise_clip": None, "top_fraction": 0.0, "interpolation_weight": 0.0}


class Config(Section):
    """One run. Only `cli`, `setup`, `train` and tests see it whole."""

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
        self._check_rollouts()
        self._check_teacher()
        self._check_policy_gradient()
        self._check_idle_keys()
        self._check_prompts()
        if self.run.auto_resume and (self.run.dir is None or self.run.overwrite):
            raise ValueError(
                f"run.auto_resume: got true with run.dir {self.run.dir} and run.overwrite "
                f"{str(self.run.overwrite).lower()}; needs a directory to go on in, which is not "
                "overwritten; give --run.dir, and leave out --run.overwrite"
            )
        return self

    def _check_rollouts(self) -> None:
        rollout = self.rollout
        if rollout.engine == "builtin" and (rollout.ahead or rollout.url):
            given = "rollout.ahead 1" if rollout.ahead else f"rollout.url {rollout.url}"
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
        if self.objective.name == "sft" and rollout.ahead:
            raise ValueError(
                "rollout.ahead: got 1 with objective.name 'sft'; the reference solutions are "
                "trained on and nothing is sampled; leave it out"
            )

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss compares the student with a teacher that sees a solution."""
        return self.objective.name in ("paint", "sampled_token")

    @property
    def has_second_pass(self) -> bool:
        """Whether the loss compares the student with other weights: a teacher's or the base's."""
        return self.uses_teacher or (self.objective.name == "grpo" and self.grpo.kl_weight > 0)

    @property
    def samples(self) -> bool:
        """Whether the run draws anything from the model: rollouts, or answers in evaluations."""
        return self.objective.name != "sft" or self.eval.enabled

    @property
    def num_updates(self) -> int:
        """Optimizer steps on each batch of rollouts."""
        return self.grpo.num_updates if self.objective.name == "grpo" else 1

    def _check_teacher(self) -> None:
        teacher = self.teacher
        changed = [
            name
            for name, off in (("weights", "fixed"), ("reason_first", False))
            if getattr(teacher, name) != off
        ]
        if changed and not self.uses_teacher:
            raise ValueError(
                f"teacher.{changed[0]}: got {getattr(teacher, changed[0])!r} with objective.name "
                f"{self.objective.name!r}, which has no teacher; leave it out, or use "
                "--objective.name paint or sampled_token"
            )
        if teacher.reason_first and self.rollout.ahead:
            raise ValueError(
                "rollout.ahead: got 1 with teacher.reason_first true; the rationales are asked of "
                "the engine that samples the next batch, so that training would wait for both; "
                "leave out one of them"
            )
        if teacher.weights == "ema" and not self.lora.enabled:
            raise ValueError(
                "teacher.weights: got 'ema' with lora.enabled false; the running mean is one of "
                "adapters; train adapters, or use --teacher.weights fixed or live"
            )

    def _check_idle_keys(self) -> None:
        objective, teacher = self.objective, self.teacher
        if objective.name != "paint":
            self._check_unchanged("objective", objective, _PAINT_ALONE, "paint")
        if not self.uses_teacher:
            self._check_unchanged(
                "masking", self.masking, tuple(MaskingSection.model_fields), "paint"
            )
        if objective.name != "grpo":
            self._check_unchanged("grpo", self.grpo, tuple(GrpoSection.model_fields), "grpo")
        if objective.divergence != "jsd" and objective.jsd_weight != 0.5:
            raise ValueError(
                f"objective.jsd_weight: got {objective.jsd_weight} with objective.divergence "
                f"{objective.divergence!r}, which has no such weight; leave it out, or use "
                "--objective.divergence jsd"
            )
        if teacher.weights != "ema" and teacher.ema_decay != 0.999:
            raise ValueError(
                f"teacher.ema_decay: got {teacher.ema_decay} with teacher.weights "
                f"{teacher.weights!r}, which is no running mean; leave it out, or use "
                "--teacher.weights ema"
            )

    def _check_unchanged(
        self, title: str, section: Section, names: tuple[str, ...], user: str
    ) -> None:
        """Refuses values that only the objective `user` would read."""
        got, back = [], []
        for name in names:
            value, default = getattr(section, name), type(section).model_fields[name].default
            if value not in (default, _SWITCHED_OFF.get(name, default)):
                got.append(f"{title}.{name}: got {value!r}")
                back.append(f"--{title}.{name} {str(default).lower()}")
        if got:
            raise ValueError(
                f"{', '.join(got)} with objective.name {self.objective.name!r}, which has no use "
                f"for {'it' if len(got) == 1 else 'them'}; go back to {' '.join(back)}, or use "
                f"--objective.name {user}"
            )

    def _check_prompts(self) -> None:
        prompts = self.prompts
        if self.teacher.reason_first and "{rationale}" not in prompts.teacher_template:
            raise ValueError(
                f"prompts.teacher_template: got {prompts.teacher_template!r} with "
                "teacher.reason_first true; needs {rationale} in it, since a rationale would be "
                "written and shown to nobody; add it, or use --teacher.reason_first false"
            )
        read = prompts.student_template + (prompts.teacher_template if self.uses_teacher else "")
        read += prompts.reason_template if self.teacher.reason_first else ""
        if prompts.instruction != INSTRUCTION and "{instruction}" not in read:
            raise ValueError(
                f"prompts.instruction: got {prompts.instruction!r} with templates that have no "
                "{instruction}; leave it out, or put {instruction} into prompts.student_template"
            )

    def _check_policy_gradient(self) -> None:
        objective, rollout, size = self.objective, self.rollout, self.grpo.group_size
        if objective.name == "grpo" and self.train.batch_size % size:
            raise ValueError(
                f"train.batch_size: got {self.train.batch_size} with grpo.group_size {size}; needs "
                "a multiple of it, since the batch is made of whole groups; change one of them"
            )
        if objective.importance_cap is None:
            return
        if objective.name not in ("grpo", "sampled_token"):
            raise ValueError(
                f"objective.importance_cap: got {objective.importance_cap} with objective.name "
                f"{objective.name!r}, which does not use the sampler's probabilities; use "
                "--objective.importance_cap none"
            )
        truncated = rollout.top_p < 1 or rollout.top_k != -1
        if truncated or rollout.temperature != objective.temperature:
            raise ValueError(
                f"objective.importance_cap: got {objective.importance_cap} with rollout.top_p "
                f"{rollout.top_p}, rollout.top_k {rollout.top_k}, rollout.temperature "
                f"{rollout.temperature} and objective.temperature {objective.temperature}; the "
                "sampler's and the trainer's probabilities are comparable only without truncation "
                "and at one temperature; use --rollout.top_p 1.0 --rollout.top_k -1 and equal "
                "temperatures, or --objective.importance_cap none"
            )
