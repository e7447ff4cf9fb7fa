"""The schema of a study: closed, typed, frozen; every field is documented here and nothing else is accepted.

Strict types: text is not a number (but `8/255` and `1e-3` are numbers as the field writes them), `true` is not 1, NaN and
infinity are refused, unknown keys are faults with the nearest valid one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from robustlayers.study.fields import Closed, Named, Options, Patch, Quantity, folder_name

__all__ = [
    "ClaimConfig",
    "CorruptionsConfig",
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "MonitorConfig",
    "NormalizationConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "RecalibrateConfig",
    "Recipe",
    "ScheduleConfig",
    "StartConfig",
    "StopConfig",
    "StudyConfig",
    "ThreatConfig",
    "TrainingConfig",
]


class AugmentConfig(Closed):
    """Random changes of the training images, per image."""

    crop: int = Field(default=0, ge=0, le=64, description="pixels of zero padding before a random crop; 0 is off")
    flip: bool = Field(default=False, description="mirror left and right with probability 1/2")


class DataConfig(Closed):
    """The images: a name that `robustlayers data list` shows, or parquet:FOLDER, idx:FOLDER, npz:FILE."""

    name: str
    validation: Quantity = Field(
        default=0.1, ge=0, le=0.9, description="share cut from train, stratified, for every choice"
    )
    validation_seed: int = Field(default=0, ge=0, description="of the cut; the same for all seeds of the study")
    augment: AugmentConfig = AugmentConfig()
    train_images: int | None = Field(
        default=None, ge=10, description="use only about so many training images, the same share of each class"
    )
    test_images: int | None = Field(default=None, ge=10, description="use only so many test images, the first ones")


class ModelConfig(BaseModel):
    """A model's name and its own options, such as depth and width."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """All but the name."""
        return dict(self.__pydantic_extra__ or {})


class ThreatConfig(Closed):
    """The set of allowed perturbations: |x_adv - x| <= eps in this norm, inside [0, 1]."""

    norm: Literal["linf", "l2", "l1"]
    eps: Quantity = Field(gt=0, description="pixel units of [0, 1]; write 8/255")


class SwitchConfig(Closed):
    """What norm layers do in one pass."""

    by: Literal["auto", "batch", "running", "frozen", "mixture"] = Field(
        default="auto", description="statistics that normalize; frozen: those at the start of the phase"
    )
    update: bool | Literal["auto"] = Field(default="auto", description="the running statistics, by the batch")
    momentum: Annotated[Quantity, Field(gt=0, le=1)] | Literal["cumulative"] | None = Field(
        default=None, description="of the update; cumulative: the mean of all batches"
    )
    alpha: Quantity | None = Field(
        default=None, ge=0, le=1, description="of mixture: alpha batch + (1 - alpha) running"
    )
    branch: str | None = Field(default=None, description="of layers that have it: main, auxiliary, ...")
    condition: Quantity | None = Field(default=None, ge=0, le=1, description="of conditional layers")

    @model_validator(mode="after")
    def _fits(self) -> SwitchConfig:
        if (self.by == "mixture") != (self.alpha is not None):
            raise ValueError("alpha, the share of the batch, goes with by: mixture, and the other way round")
        if self.momentum is not None and self.update is False:
            raise ValueError("momentum: this pass updates nothing; leave the momentum out")
        return self


class PassesConfig(Closed):
    """A switch for each pass; those left out are the habit's."""

    habit: (
        Literal[
            "standard",
            "rice",
            "trades",
            "mart",
            "clean-statistics",
            "adversarial-statistics",
            "frozen",
            "batch-at-test",
        ]
        | None
    ) = Field(default=None, description="a published policy")
    craft: SwitchConfig | None = Field(default=None, description="forwards of the attack")
    score: SwitchConfig | None = Field(default=None, description="an added forward of what was crafted")
    clean: SwitchConfig | None = None
    adversarial: SwitchConfig | None = None
    joint: SwitchConfig | None = Field(
        default=None, description="clean and adversarial images as one batch, in the place of two passes"
    )
    again: SwitchConfig | None = Field(default=None, description="an added clean forward before the update")
    ascent: SwitchConfig | None = Field(
        default=None, description="passes at weights that an ascent has perturbed; no update unless given"
    )
    log: SwitchConfig | None = Field(default=None, description="an added clean forward after the update")
    evaluate: SwitchConfig | None = Field(default=None, description="measuring")

    @model_validator(mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        return {"habit": value} if isinstance(value, str) else value


class NormalizationConfig(PassesConfig):
    """The norm policy: a habit's name, or a switch for each pass that differs from it; `standard` unless given."""

    layers: dict[str, PassesConfig] = Field(
        default={}, description="selector, or name of a group -> what its norm layers do otherwise"
    )


class ScheduleConfig(Closed):
    """How the learning rate changes over a phase."""

    name: Literal["constant", "cosine", "cyclic", "linear", "one-cycle", "piecewise"] = "constant"
    milestones: list[Annotated[Quantity, Field(gt=0, lt=1)]] = Field(
        default=[0.5, 0.75], description="of piecewise, as fractions of the phase"
    )
    factor: Quantity = Field(default=0.1, gt=0, le=1, description="of piecewise")
    peak: Quantity = Field(default=0.4, gt=0, lt=1, description="of one-cycle and cyclic, as a fraction of a cycle")
    warmup: Quantity = Field(
        default=0.0, ge=0, lt=1, description="linear rise at the start, as a fraction of the phase"
    )
    cycles: int = Field(default=1, ge=1, description="of cyclic")


class GroupOptimizerConfig(Closed):
    """What one group does otherwise; left out: as the rest does."""

    lr: Quantity | None = Field(default=None, gt=0)
    scale: Quantity | None = Field(default=None, gt=0, description="in the place of lr, a multiple of the phase's rate")
    momentum: Quantity | None = Field(default=None, ge=0, lt=1)
    nesterov: bool | None = None
    weight_decay: Quantity | None = Field(default=None, ge=0)
    clip: Quantity | None = Field(default=None, gt=0, description="bound on the norm of this group's gradient")
    every: int | None = Field(default=None, ge=1, description="update on every so many steps")
    drift: bool | None = Field(default=None, description="spread each update evenly over those steps")
    schedule: ScheduleConfig | None = None


class OptimizerConfig(Closed):
    """One optimizer for the trained groups of a phase."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Quantity = Field(default=0.1, gt=0)
    momentum: Quantity = Field(default=0.9, ge=0, lt=1)
    weight_decay: Quantity = Field(default=5e-4, ge=0)
    nesterov: bool = False
    betas: list[Annotated[Quantity, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    decay: Literal["all", "weights"] = Field(
        default="all", description="what weight decay reaches; weights: neither norm layers nor biases"
    )
    clip: Quantity | None = Field(
        default=None, gt=0, description="bound on the norm of the gradient of all groups without a clip of their own"
    )
    rates: Literal["fixed", "rgn"] = Field(
        default="fixed", description="of layers; rgn: by relative gradient norm, measured every epoch"
    )
    rates_batches: int = Field(default=5, ge=1, description="batches that layer rates are measured on")
    groups: dict[str, GroupOptimizerConfig] = Field(
        default={}, description="group of the phase -> what it does otherwise"
    )

    @model_validator(mode="after")
    def _fits(self) -> OptimizerConfig:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum of more than 0")
        return self


class TrainingConfig(Closed):
    """Settings that every phase shares unless it says otherwise; mappings are merged key by key."""

    batch_size: int = Field(default=128, ge=2)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    normalization: NormalizationConfig = NormalizationConfig()
    crafting: Literal["fp32", "bf16", "auto"] = Field(
        default="fp32", description="precision of crafting; auto: the fastest whose gradient agrees with the model's"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="of the forwards that are learned from; bf16: under autocast, norm layers, losses and weights in fp32",
    )
    statistics: Literal["sync", "mean", "none"] = Field(
        default="sync",
        description="of batch norm where processes share a batch; sync: of the whole batch; else each normalizes by its "
        "part, and the running ones are the mean of all, or those of the first",
    )


class StartConfig(BaseModel):
    """A start that needs a source: a file, an earlier phase, an earlier epoch, or a run in another study's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)
    load: str | None = Field(default=None, description="a safetensors file with the group's tensors")
    map: dict[str, str] = Field(default={}, description="names, or dotted prefixes, in the file -> in the model")
    phase: str | None = Field(
        default=None, alias="from", description="an earlier phase, or initial; with run: its phase"
    )
    rewind: int | None = Field(
        default=None, ge=0, description="the epoch, over all phases, at whose end the group was so"
    )
    run: str | None = Field(default=None, description="the folder of another study's results, for the same seed")
    arm: str | None = Field(default=None, description="with run: its arm; not needed where there is one")
    checkpoint: Literal["best", "last"] = Field(default="last", description="of from and run")
    mix: Quantity = Field(
        default=1.0, gt=0, le=1, description="share of the source; the rest stays: (1 - mix) own + mix source"
    )


class RecalibrateConfig(Closed):
    """Running statistics estimated anew on training images, while nothing else moves."""

    select: str = Field(default="norm", description="the norm layers whose statistics are estimated")
    on: Literal["clean", "adversarial", "noise"] = Field(
        default="clean", description="inputs; noise: uniform in the ball of the threat"
    )
    momentum: Quantity | None = Field(
        default=None, gt=0, le=1, description="of a moving average; none: each batch weighs the same"
    )


class StopConfig(Closed):
    """When a phase ends before its time: after `patience` epochs in which a validation metric has not risen."""

    patience: int = Field(ge=1)
    metric: Literal["auto", "robust", "clean"] = Field(
        default="auto", description="auto: the one that chooses the best"
    )
    least: Quantity = Field(default=0.0, ge=0, description="a rise counts from so much on, as a share of the images")


class PhaseConfig(TrainingConfig):
    """A stretch of training in which each group of tensors has one signal; or a change of tensors without training."""

    name: Named
    epochs: int | None = Field(default=None, ge=0, description="0 leaves the phase out")
    steps: int | None = Field(default=None, ge=1, description="the length in steps, in the place of epochs")
    train: dict[str, str | dict[str, Quantity]] = Field(
        default={}, min_length=1, description="group -> signal; a group is a name from `groups` or a selector"
    )
    recalibrate: RecalibrateConfig | None = Field(default=None, description="instead of train")
    assign: dict[str, str | StartConfig] = Field(
        default={}, min_length=1, alias="set", description="instead of train: group -> where its values come from"
    )
    start: dict[str, str | StartConfig] = Field(default={}, description="group -> where it begins; keep unless given")
    attack: str | Options | None = Field(default=None, description="of the adversarial pass; the study's unless given")
    windows: dict[str, list[Quantity]] = Field(
        default={}, description="group -> [begin, end], the part of the phase in which it learns, in fractions"
    )
    perturbation: str | Options | None = Field(default=None, description="schedule of the attack's eps")
    ascent: str | Options | None = Field(
        default=None, description="perturbs weights before each gradient: awp, sam, ..."
    )
    average: str | Options | None = Field(default=None, description="the phase's result is an average of its weights")
    stop: StopConfig | None = Field(default=None, description="end before the time is up")
    keep: int | None = Field(default=None, ge=1, description="keep the net after every so many epochs, to look at it")

    @property
    def kind(self) -> Literal["train", "recalibrate", "set"]:
        """What the phase does."""
        return "recalibrate" if self.recalibrate is not None else "set" if self.assign else "train"

    @property
    def skipped(self) -> bool:
        """Whether an arm leaves the phase out."""
        return self.epochs == 0

    @model_validator(mode="after")
    def _one_kind(self) -> PhaseConfig:
        kinds = [
            key
            for key, given in (
                ("train", self.train),
                ("recalibrate", self.recalibrate is not None),
                ("set", self.assign),
            )
            if given
        ]
        if len(kinds) > 1:
            raise ValueError(f"{' and '.join(kinds)} exclude each other; make them phases of their own")
        if not kinds:
            raise ValueError("key 'train' is missing")
        if self.kind == "train":
            if self.epochs is None and self.steps is None:
                raise ValueError("key 'epochs' is missing")
            if self.epochs is not None and self.steps is not None:
                raise ValueError("epochs and steps exclude each other; give one of them")
            return self
        if self.epochs not in (None, 0, 1):
            raise ValueError(f"epochs: {self.epochs} is not allowed with {self.kind}; allowed: 0 or 1")
        return self


class MonitorConfig(Closed):
    """What is measured after every epoch: the learning curves, and the choice of the best checkpoint."""

    attack: str | Options = "pgd-10"
    images: int = Field(default=1000, ge=1, description="at most so many of train and of validation")
    select: Literal["auto", "robust", "clean"] = Field(
        default="auto", description="validation accuracy that chooses the best epoch; auto: what the phase trains for"
    )


class CorruptionsConfig(Closed):
    """Common corruptions of the test images, made in code: accuracy by family and severity."""

    families: list[str] = Field(description="all, groups of them (noise, blur, weather, digital, extra), or names")
    severities: list[Annotated[int, Field(ge=1, le=5)]] = Field(default=[1, 2, 3, 4, 5], min_length=1)
    images: int | None = Field(default=None, ge=1, description="at most so many test images, the first ones")

    @model_validator(mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        value = {"families": value} if isinstance(value, str | list) else value
        if isinstance(value, dict) and isinstance(value.get("families"), str):
            name = value["families"]
            value = {**value, "families": [] if name == "none" else [name]}
        return value

    @model_validator(mode="after")
    def _once(self) -> CorruptionsConfig:
        for name, values in (("families", self.families), ("severities", self.severities)):
            if len(set(values)) < len(values):
                raise ValueError(f"one of the {name} stands there twice")
        return self


class EvaluateConfig(Closed):
    """What is measured on the test set, once per reported row."""

    attacks: list[str | Options] = Field(default=["pgd-20"], min_length=1)
    checkpoints: list[Literal["best", "last"]] = Field(default=["best", "last"], min_length=1)
    batch_size: int = Field(default=500, ge=1)
    branches: bool = Field(
        default=False, description="of nets with branches: crafted on each and measured on each, as rows of their own"
    )
    corruptions: CorruptionsConfig = Field(
        default=CorruptionsConfig(families=[]), description="none, all, names of families, or a mapping with more"
    )
    sanity: bool = Field(default=False, description="accuracy against eps and steps, on the first 100 test images")
    monitor: MonitorConfig = MonitorConfig()


class ClaimConfig(Closed):
    """A statement in words and as a comparison that a paired test over the seeds can support or contradict."""

    say: str = Field(min_length=1)
    that: str = Field(min_length=1)


class Recipe(Closed):
    """Everything that decides a result but the seed: one arm of a study, all factors applied."""

    data: DataConfig
    model: ModelConfig
    threat: ThreatConfig
    attack: str | Options = "pgd-10"
    groups: dict[Named, str] = Field(default={}, description="names for selectors")
    training: TrainingConfig = TrainingConfig()
    phases: list[PhaseConfig] = Field(min_length=1)
    evaluate: EvaluateConfig = EvaluateConfig()


class StudyConfig(Recipe):
    """A recipe x factors x seeds, the question it answers, and its claims."""

    question: str = Field(min_length=1)
    name: Annotated[Named, AfterValidator(folder_name)] | None = Field(
        default=None, description="the file's name unless given"
    )
    factors: dict[Named, dict[str, Patch]] = Field(
        default={}, description="factor -> level -> patch {dotted path: value}"
    )
    seeds: Annotated[int, Field(ge=1, le=1000)] | list[Annotated[int, Field(ge=0)]] = 3
    claims: list[ClaimConfig] = Field(default=[])
