"""The schema of recipes/*.yaml: every knob, its type, its default. Imports no torch.

A recipe is read once, checked whole, and passed down as plain values. Knobs that TRL has carry its
names and defaults (GRPOConfig, SFTConfig of TRL 1.16); the others say so.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Convert(Section):
    """A softmax Transformer (Llama, Qwen2 or Qwen3) made into an SSE-H."""

    source: str
    """A folder, a hub id, or a GGUF file."""
    attention_layers: NonNegative | list[NonNegative] | None = None
    """How many layers stay softmax attention, evenly spread, or which; None: one in four."""
    linear_attn_type: Literal["gla", "gdn"] = "gla"
    num_sparse_partition: Positive = 4
    num_writer: Positive = 1
    """Partitions that a token writes and reads."""
    use_short_conv: bool = True
    """Stands in for the neighbours that RoPE let attention find; starts as the identity."""
    use_output_gate: bool = False
    """Its projection has no bias, so it cannot start at 1: the gap to the teacher is wider."""


class Model(Section):
    """Where the policy comes from: a checkpoint folder, a fresh model of `config`, or a softmax
    Transformer to `convert`; exactly one of the three."""

    path: str | None = None
    """A folder with an SSE-H and its tokenizer, which `data.tokenizer` must name too, or a run's:
    its export, else its last checkpoint."""
    config: dict[str, Any] | None = None
    """Keys of SSEConfig, for a model from scratch; the tokenizer sets the vocabulary size."""
    convert: Convert | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: NonNegative | None = None
    """Of a fresh model's weights; None takes the run's. With `sft.seed`, runs of several seeds
    start from one and the same base, so that what differs is the reinforcement learning."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum(origin is not None for origin in (self.path, self.config, self.convert)) != 1:
            raise ValueError("give exactly one of model.path, model.config, model.convert")
        return self


class Source(Section):
    """Problems from a JSONL file, a hub dataset, or a generated task; exactly one of the three."""

    path: str | None = None
    """A .jsonl or .parquet file, relative to the working directory."""
    dataset: str | None = None
    """A Hugging Face dataset id."""
    dataset_config: str | None = None
    split: str = "train"
    task: str | None = None
    """A generated task of reasoning-gym, e.g. chain_sum."""
    task_args: dict[str, Any] = Field(default_factory=dict)
    size: Positive = 10000
    """Problems to generate, before duplicates are dropped."""
    seed: NonNegative = 0
    """Of the generated problems, apart from the run's seed: every run sees the same split."""
    problem: str = "problem"
    """Name of the column with the question; likewise the next ones."""
    answer: str = "answer"
    solution: str = "solution"
    """A worked solution to imitate in the cold start; without one, the answer in a box."""
    answer_match: Pattern | None = None
    """A regular expression; its first group, in the last match, is the answer: of openai/gsm8k,
    "#### (.+)"."""
    solution_remove: Pattern | None = None
    """A regular expression; what it matches is cut out of solutions: of GSM8K, "<<.*?>>"."""
    id: str = "id"
    kind: Literal["auto", "aime", "math"] = "auto"
    """How answers are compared. Of a generated task, `aime` keeps the problems that it can compare,
    whose answer is an integer 0..999."""
    limit: Positive | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum(origin is not None for origin in (self.path, self.dataset, self.task)) != 1:
            raise ValueError("give exactly one of path, dataset, task")
        return self


class Data(Section):
    tokenizer: str = "bytes"
    """`bytes` is the byte-level tokenizer of this package; otherwise a folder or a hub id."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's own template."""
    system_prompt: str | None = None
    prompt_template: str = (
        "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    )
    """A Python format string over the row's columns."""
    max_prompt_length: Positive = 1024
    """Tokens. A longer training prompt is left out and counted, a longer test prompt an error."""
    train: Source
    test: Source | None = None
    """Held-out problems; without it, `test_fraction` of train, chosen by a hash of the question."""
    test_fraction: Fraction = 0.1
    test_limit: Positive | None = None


class Corpus(Source):
    """Text to distil on: problems with their solutions, rendered as in the cold start, or with
    `text` any column of text or chat messages."""

    text: str | None = None
    """The column to read; its values are strings, or lists of {role, content} messages."""


class Distill(Section):
    """Teaches a converted model what its teacher does: first each layer, given the teacher's input
    to it, then the logits."""

    corpora: list[Corpus] = Field(default_factory=list)
    """What is read, packed in one row after another; the problems of data.train if empty."""
    eval: list[Corpus] = Field(default_factory=list)
    """Text whose perplexity is measured; the held-out problems of `data` if empty."""
    eval_tokens: Positive = 65536
    """At most, of each."""
    teacher_prompts: NonNegative = 0
    """Problems of data.train that the teacher answers itself; its answers join the corpora."""
    max_completion_length: Positive = 512
    """Tokens of such an answer."""
    teacher_steps: NonNegative = 0
    """Optimiser steps in which the teacher itself learns the text before it teaches."""
    teacher_learning_rate: PositiveFloat = 1e-4
    align_steps: NonNegative = 200
    """Optimiser steps of the first stage, which trains the converted layers alone."""
    align_learning_rate: PositiveFloat = 1e-3
    max_steps: NonNegative
    """Optimiser steps of the second stage, which trains all weights."""
    learning_rate: PositiveFloat = 1e-4
    lr_scheduler_type: Literal["linear", "constant", "cosine", "constant_with_warmup"] = "cosine"
    """Of each stage; likewise the next ones."""
    warmup_steps: NonNegative = 20
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    temperature: PositiveFloat = 1.0
    """Of both distributions in the divergence of the second stage, KL(teacher | student)."""
    kl_coef: NonNegativeFloat = 1.0
    lm_coef: NonNegativeFloat = 0.5
    """Weight of the cross-entropy with the text itself."""
    per_device_train_batch_size: Positive = 8
    """Rows of max_length tokens."""
    gradient_accumulation_steps: Positive = 1
    max_length: Positive = 1024
    """Tokens of a packed row; a longer document goes on in another row."""
    gradient_checkpointing: bool = False
    bf16: bool = False
    logging_steps: Positive = 10
    save_steps: NonNegative = 100
    """Steps between checkpoints that an interrupted stage goes on from; 0 starts it anew."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.max_steps and self.kl_coef == 0 and self.lm_coef == 0:
            raise ValueError("kl_coef and lm_coef are both 0: the second stage would learn nothing")
        return self


class Sft(Section):
    """The cold start. SFTConfig's names; packing and the loss on the completion alone are on."""

    max_steps: Positive
    seed: NonNegative | None = None
    """None takes the run's."""
    learning_rate: PositiveFloat = 2e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: NonNegative = 0
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    per_device_train_batch_size: Positive = 8
    gradient_accumulation_steps: Positive = 1
    max_length: Positive = 1024
    """Tokens of a packed row; an example longer than that is left out and counted."""
    gradient_checkpointing: bool = True
    bf16: bool = False
    logging_steps: Positive = 10
    save_steps: NonNegative = 0
    """Steps between checkpoints that an interrupted cold start goes on from; 0 starts it anew."""


class Correction(Section):
    """What to do about the gap between the log-probs of rollout and learner."""

    level: Literal["none", "token", "sequence", "geometric"] = "sequence"
    """sequence is exp of the summed log-ratio, geometric exp of its mean."""
    mode: Literal["mask", "truncate"] = "mask"
    """truncate clamps the ratio into the band, mask zeroes what lies outside it."""
    clip_min: NonNegativeFloat | None = None
    clip_max: PositiveFloat | None = 3.0


class Difficulty(Section):
    """Trains on prompts of known difficulty: before the first step each is answered, as training
    would, and those too hard or too easy are left out. Needs the reward component `accuracy`."""

    num_samples: Positive = 8
    """Answers to each prompt."""
    min_pass_rate: Fraction = 0.05
    """Share of right answers; likewise the next one."""
    max_pass_rate: Fraction = 0.95
    limit: Positive | None = None
    """Prompts to measure, the first that would be dealt; the others are left out."""
    path: str | None = None
    """difficulty.jsonl of another run from the same base: a prompt that stands there, by its id and
    its tokens, is not measured again."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(
                f"min_pass_rate = {self.min_pass_rate} is above "
                f"max_pass_rate = {self.max_pass_rate}: no prompt would be left"
            )
        return self


class EarlyStop(Section):
    """Ends GRPO before `max_steps` where the policy has collapsed; the last weights are evaluated
    as at the end. Each limit is on a mean over `window` steps; None is none."""

    window: Positive = 10
    min_entropy: NonNegativeFloat | None = None
    """Nats a token; likewise the next one."""
    max_entropy: PositiveFloat | None = None
    min_length: NonNegativeFloat | None = None
    """Tokens of a mean answer."""
    max_truncated: Fraction | None = None
    """Share of answers that were cut off."""
    min_reward_share: Fraction | None = None
    """Of the best mean reward that any `window` steps before had."""


class Grpo(Section):
    max_steps: Positive
    prompts_per_step: Positive = 8
    """Prompts in one optimisation batch; `num_generations` answers each."""
    num_generations: Positive = 8
    max_completion_length: Positive = 512
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegative = 0
    min_p: Fraction | None = None

    learning_rate: NonNegativeFloat = 1e-6
    lr_scheduler_type: Literal["linear", "constant", "cosine", "constant_with_warmup"] = "linear"
    warmup_steps: NonNegative = 0
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    num_iterations: Positive = 1
    """Optimiser steps on each batch of rollouts."""
    gradient_checkpointing: bool = False

    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo"] = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    epsilon: NonNegativeFloat = 0.2
    epsilon_high: NonNegativeFloat | None = None
    """A wider upper clip keeps unlikely tokens alive (DAPO, arXiv 2503.14476)."""
    delta: PositiveFloat | None = None
    """Upper bound of the ratio where the advantage is negative (dual clip)."""
    beta: NonNegativeFloat = 0.0
    """Weight of the KL with the model that GRPO started from (k3 estimator)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    mask_truncated_completions: bool = False
    router_aux_loss_coef: NonNegativeFloat | None = None
    """Weight of the load-balance loss; the model's own `aux_loss_coef` if not given."""

    max_tokens_per_micro_batch: Positive = 16384
    """The budget of one packed row; how a batch is split never changes its gradient."""
    share_prompts: bool = False
    """The learner reads a prompt once for its answers in a row, which go on from its state. Less
    work, and more memory a token, the longer prompts are beside answers."""
    routing_replay: bool = True
    """The learner routes each token as the rollout did."""
    exact_logprobs: bool = False
    """The learner's log-probs come from the forms that sampled (token by token), their gradient
    from the chunked ones. On the CPU rollout and learner then agree to the bit, at the price of
    another pass of decoding for each update; on a GPU it is a check, not a promise."""
    correction: Correction = Field(default_factory=Correction)
    max_staleness: NonNegative = 0
    """Weight versions that a trajectory may lag behind; 0 is synchronous."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal and refill the batch (DAPO)."""
    dynamic_sampling_max_rounds: Positive = 4
    """Rounds of refilling before the step goes on with the groups it has."""
    difficulty: Difficulty | None = None
    """Which prompts are worth asking; None takes all."""
    early_stop: EarlyStop | None = None
    shuffle_rewards: bool = False
    """A control experiment: rewards permuted within the batch. Learning must vanish."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.num_generations == 1 and self.scale_rewards == "group":
            raise ValueError(
                "num_generations = 1 with scale_rewards = group: a group of one has no spread; "
                "use num_generations >= 2"
            )
        if self.num_generations == 1:
            raise ValueError(
                "num_generations = 1: the group's mean is its only reward, so every "
                "advantage is 0; use num_generations >= 2"
            )
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high < 1):
            raise ValueError(
                f"loss_type = cispo caps each weight at epsilon_high, an absolute value: "
                f"epsilon_high must be >= 1 (e.g. 5.0), got {self.epsilon_high}"
            )
        if self.dynamic_sampling and self.shuffle_rewards:
            raise ValueError("dynamic_sampling and shuffle_rewards exclude each other")
        if self.share_prompts and self.exact_logprobs:
            raise ValueError(
                "share_prompts with exact_logprobs: the latter scores trajectories as they were "
                "sampled, one by one; set one of them to false"
            )
        return self


class Rollout(Section):
    num_workers: Positive = 1
    num_cpus_per_worker: PositiveFloat = 1.0
    num_gpus_per_worker: NonNegativeFloat = 0.0
    num_threads: Positive | None = None
    """torch threads of each worker; None leaves Ray's choice."""
    max_num_seqs: Positive = 256
    """State slots: sequences decoded together."""
    max_num_batched_tokens: Annotated[int, Field(ge=64)] = 8192
    """Prompt tokens prefilled in one step."""
    page_size: Annotated[int, Field(ge=16, multiple_of=16)] = 64
    num_pages: Annotated[int, Field(ge=2)] | None = None
    """KV pages; None takes what max_num_seqs sequences of full length need."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    timeout_s: PositiveFloat = 600.0
    """A worker that gives no sign of life for this long is replaced."""
    max_restarts: NonNegative = 3
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)


class Reward(Section):
    name: str
    """accuracy, boxed, think_format, soft_overlong, repetition, or a function in TRL's signature:
    `package.module:function` or `FILE.py:function`."""
    weight: float = 1.0
    args: dict[str, Any] = Field(default_factory=dict)

    @property
    def file(self) -> str | None:
        """FILE.py of `FILE.py:function`."""
        place = self.name.rpartition(":")[0]
        return place if place.endswith(".py") else None


class Rewards(Section):
    components: list[Reward] = Field(
        default_factory=lambda: [Reward(name="accuracy")], min_length=1
    )
    num_workers: Positive = 1
    """Killable grader processes."""
    time_limit_s: PositiveFloat = 2.0
    batch_timeout_s: PositiveFloat = 300.0


class Eval(Section):
    every: NonNegative = 0
    """GRPO steps between evaluations; 0 evaluates before the first and after the last only."""
    num_workers: NonNegative = 0
    """Workers, as `rollout` describes them, that evaluate while training goes on; 0 evaluates
    between two steps on the rollout workers."""
    num_samples: Positive = 4
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Positive | None = None
    """None takes grpo.max_completion_length."""
    greedy: bool = True
    """One more sample at temperature 0, reported beside."""
    benchmarks: list[str] = Field(default_factory=list)
    """Further benchmarks, by name or path; the held-out problems of `data` are always evaluated."""


class Checkpoint(Section):
    every: NonNegative = 50
    """GRPO steps between checkpoints; 0 writes one at the end only."""
    keep: Positive = 2
    best: bool = False
    """Keep in `best/` the weights that scored highest on the first benchmark, the base among them,
    and export those instead of the last."""


class Cluster(Section):
    learner_cpus: PositiveFloat = 1.0
    learner_gpus: NonNegativeFloat = 0.0
    learner_threads: Positive | None = None
    reward_cpus: NonNegativeFloat = 0.0
    placement_timeout_s: PositiveFloat = 120.0
    learner_timeout_s: PositiveFloat = 1800.0


class Export(Section):
    enabled: bool = True


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: NonNegative = 0
    model: Model
    data: Data
    distill: Distill | None = None
    sft: Sft | None = None
    grpo: Grpo | None = None
    rollout: Rollout = Field(default_factory=Rollout)
    rewards: Rewards = Field(default_factory=Rewards)
    eval: Eval = Field(default_factory=Eval)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    cluster: Cluster = Field(default_factory=Cluster)
    export: Export = Field(default_factory=Export)

    @model_validator(mode="after")
    def _exactness(self) -> Self:
        threads = self.rollout.num_threads, self.cluster.learner_threads
        on_cpu = not self.cluster.learner_gpus and not self.rollout.num_gpus_per_worker
        exact = self.grpo is not None and self.grpo.exact_logprobs
        if exact and on_cpu and (threads[0] is None or threads[0] != threads[1]):
            raise ValueError(
                "grpo.exact_logprobs: threads split sums, so rollout.num_threads and "
                f"cluster.learner_threads must be given and equal, got {threads[0]}, {threads[1]}"
            )
        return self

    @model_validator(mode="after")
    def _measured(self) -> Self:
        components = [component.name for component in self.rewards.components]
        if self.grpo and self.grpo.difficulty and "accuracy" not in components:
            raise ValueError(
                "grpo.difficulty needs the reward component accuracy, rewards.components has "
                f"{', '.join(components)}; with weight 0 it changes no reward"
            )
        if self.checkpoint.best and self.eval.num_workers:
            raise ValueError(
                f"checkpoint.best with eval.num_workers = {self.eval.num_workers}: weights that "
                "are evaluated beside the training are gone when their score is known; use 0"
            )
        return self

    @model_validator(mode="after")
    def _teacher(self) -> Self:
        if self.distill is not None and self.model.convert is None:
            raise ValueError("distill needs a teacher: give model.convert")
        if self.model.convert is not None and self.data.tokenizer == "bytes":
            raise ValueError(
                f"data.tokenizer = bytes with model.convert: the model reads its teacher's tokens; "
                f"set data.tokenizer to {self.model.convert.source}"
            )
        return self
