"""Schema of a run's configuration: one dataclass per section of the YAML file.

Defaults are the paper's 7B model. `number` declares the range of a key, `Literal` its choices; both
are checked by `config.fields.check_section`.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

from megatron_owl2.config.fields import number, numbers
from megatron_owl2.config.fp8 import FP8
from megatron_owl2.config.templates import Template, TemplateName, Tokenization, template_of

ModalitySplit = Literal["input_norm", "key_value", "mlp_norm"]
MODALITY_SPLIT: tuple[ModalitySplit, ...] = get_args(ModalitySplit)
AbstractorPositions = Literal["sincos", "none"]
ImageMode = Literal["stretch", "pad", "crop"]
Recompute = Literal["none", "selective", "full"]
Backend = Literal["local", "transformer_engine"]
Elementwise = Literal["auto", "plain", "fused"]
Precision = Literal["fp32", "bf16"]

# Beyond every model: more is a mistake, which otherwise shows after minutes or in lost memory.
_size = partial(number, at_least=1, at_most=2**24)
_layers = partial(number, at_least=1, at_most=1000)


@dataclass
class VisionConfig:
    """CLIP ViT-L/14; sizes in channels and layers, `image_size` and `patch_size` in pixels."""

    image_size: int = _size(224)
    patch_size: int = _size(14)
    hidden_size: int = _size(1024)
    num_layers: int = _layers(24)
    num_heads: int = _size(16)
    ffn_size: int = _size(4096)
    norm_eps: float = number(1e-6, positive=True)  # as released; OpenAI's CLIP has 1e-5
    position_init_std: float = number(0.02, at_least=0)  # only without a CLIP start
    # Adapters over the frames of a video in every layer, and queries for them in the abstractor, as
    # in mPLUG-Owl's video variant: a video takes the visual tokens of one image.
    temporal: bool = False

    @property
    def grid_size(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size


@dataclass
class AbstractorConfig:
    """The visual abstractor; its width is the ViT's.

    `positions` of queries and keys: mPLUG-Owl2 has tables of sines and cosines, version 1 none.
    """

    num_queries: int = _size(64)
    num_layers: int = _layers(6)
    num_heads: int = _size(16)
    ffn_size: int = _size(2816)
    # Of the norm within the feed-forward network; the outer norms have 1e-5 always.
    norm_eps: float = number(1e-6, positive=True)
    # Of the query and key projections; wider makes the queries differ.
    attention_init_std: float = number(0.02, at_least=0)
    positions: AbstractorPositions = "sincos"
    attention_dropout: float = number(0.0, at_least=0, at_most=1)  # of its probabilities, below 1


@dataclass
class DecoderConfig:
    """LLaMA-2 with modality-adaptive layers.

    `modality_split` names what has weights per modality in every layer: the norm before attention
    (paper, eq. 4), keys and values (eq. 5), the norm before the MLP. The released code splits all
    three; the paper's text shows [input_norm, key_value] only; [] is the plain LLaMA of Table 5.
    `vocab_size` is the model's own, which a directory of Hugging Face has.
    """

    vocab_size: int = _size(32000)
    hidden_size: int = _size(4096)
    num_layers: int = _layers(32)
    num_heads: int = _size(32)
    num_kv_heads: int = _size(32)
    ffn_size: int = _size(11008)
    max_positions: int = _size(2048)
    norm_eps: float = number(1e-6, positive=True)
    rope_theta: float = number(10000.0, positive=True)
    modality_split: list[ModalitySplit] = field(default_factory=lambda: list(MODALITY_SPLIT))
    # Embedding and output layer have rows up to a multiple of it (Megatron-LM's
    # --make-vocab-size-divisible-by); those behind vocab_size are zero and predict nothing.
    vocab_multiple: int = _size(8)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output layer."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass
class ModelConfig:
    """The model: sizes, initialization, conversation template and how pixels are normalized (by
    channel)."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    abstractor: AbstractorConfig = field(default_factory=AbstractorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    template: TemplateName = "owl2"  # text around questions and answers (templates.py)
    tokenization: Tokenization = "turns"  # which pieces of that text are tokenised alone
    image_mean: list[float] = numbers(0.48145466, 0.4578275, 0.40821073)
    image_std: list[float] = numbers(0.26862954, 0.26130258, 0.27577711, positive=True)
    # Way of an image to the square: stretched, padded with image_mean, or its middle (CLIP).
    image_mode: ImageMode = "stretch"
    init_std: float = number(0.02, at_least=0)

    @property
    def conversation(self) -> Template:
        """The text of conversations and its tokenisation; raises ConfigError if they do not fit."""
        return template_of(self.template, self.tokenization)

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens of an image in the decoder's sequence."""
        return self.abstractor.num_queries + 1  # vit_eos closes every image


@dataclass
class ParallelConfig:
    """Sizes of Megatron's parallel groups; data parallelism takes the ranks that remain."""

    tensor: int = number(1, at_least=1)
    pipeline: int = number(1, at_least=1)
    virtual_pipeline: int = number(1, at_least=1)  # model chunks per rank, interleaved schedule
    context: int = number(1, at_least=1)  # ranks that split each sequence, in attention too
    # Sequence parallelism: between the tensor-parallel linears of the decoder, activations are
    # split along the sequence over the tensor-parallel ranks.
    sequence: bool = False
    # Communication of tensor-parallel linears in pieces within their GEMMs, through user buffers of
    # kernels.backend=transformer_engine; needs sequence. Not run on a GPU.
    tensor_overlap: bool = False
    # Decoder layers of every pipeline stage (pipeline x virtual_pipeline numbers); [] is evenly.
    layers: list[int] = field(default_factory=list)
    # Activation recomputation in the backward pass: of attention and gates, or of whole layers.
    recompute: Recompute = "none"
    overlap: bool = True  # gradient reduction and parameter gathering with computation


@dataclass
class KernelConfig:
    """Kernels of the decoder's layers; the GEMMs and attention of ViT and abstractor stay on torch
    in `train.precision`."""

    backend: Backend = "local"  # local: torch and megatron-core's own linears
    fp8: FP8 = "none"  # recipe of the linears' GEMMs, of transformer_engine only
    # Norms, rotary positions, activations and the loss: by torch or by Triton kernels; auto takes
    # these on a GPU.
    elementwise: Elementwise = "auto"


@dataclass
class SourceConfig:
    """One sharded data set, a folder or a URL, and its share of the mixture."""

    path: str = ""
    weight: float = number(1.0, at_least=0)  # 0, for all sources alike: its number of samples
    group: str = ""  # of data.groups, within which the weight counts


@dataclass
class StorageConfig:
    """Reading of shards over a network: the node's cache, retries, timeout."""

    cache: str = ""  # folder on a local disk; needed if a source is a URL
    cache_gib: float = number(50.0, positive=True)
    attempts: int = number(6, at_least=1)  # of a read, with growing pauses
    timeout: float = number(60.0, positive=True)  # seconds of one request


@dataclass
class DataConfig:
    """Training data and its loader.

    `phase` is raised by one to resume a run with other sources or weights.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    # Samples that every global batch has of the sources of a group; {}: as the weights have it.
    groups: dict[str, int] = field(default_factory=dict)
    phase: int = number(1, at_least=1)
    tokenizer: str = ""
    # Tokens of a row, after the placeholders are expanded into visual tokens.
    sequence_length: int = number(256, at_least=1)
    # Several samples in a row, which do not attend to each other. global_batch_size and
    # micro_batch_size count rows then; needs the lengths of `owl2 measure-lengths`.
    packing: bool = False
    # At most. Samples lose turns beyond it; one with more before its first answer is unusable.
    images_per_row: int = number(16, at_least=1)
    workers: int = number(2, at_least=0)
    prefetch: int = number(2, at_least=1)  # micro-batches that every worker keeps ready
    # Seconds without a batch from the workers that end a run.
    stall_timeout: float = number(1800.0, positive=True)
    seed: int = number(1234, at_least=0)
    # Random resized crop, stretched to the square, and flip; model.image_mode otherwise.
    augment: bool = False
    # Decoding of JPEGs at 1/2, 1/4 or 1/8 where that still covers the crop; never in validation.
    scaled_decoding: bool = False
    max_bad_fraction: float = number(0.01, at_least=0, at_most=1)
    max_bad_in_a_row: int = number(100, at_least=1)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass
class LoraConfig:
    """Low-rank adapters of linears of the decoder (LoRA, Hu et al., 2021): alpha / rank * B A.

    `targets` are shell globs over decoder.layers.N.attention.{query, key_text, value_text,
    key_vision, value_vision, output} and decoder.layers.N.mlp.{gate, up, down}; [] is no LoRA.
    """

    targets: list[str] = field(default_factory=list)
    rank: int = number(8, at_least=1, at_most=2**16)
    alpha: float = number(16.0, positive=True)
    dropout: float = number(0.0, at_least=0, at_most=1)  # of the adapters' inputs, below 1


@dataclass
class StageConfig:
    """A training stage: the parameters that are `trainable` and not `frozen` learn. Patterns are
    shell globs over parameter names.

    Adapters of `lora` always learn unless they are `frozen`; `trainable` then names what learns
    beside them, which may be nothing ([]), and no weight that has an adapter.
    """

    name: str = "pretrain"
    trainable: list[str] = field(default_factory=lambda: ["*"])
    frozen: list[str] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)  # pattern -> factor on the learning rate
    initial_checkpoint: str | None = None  # weights only; random weights without it
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and a cosine from `lr` to `min_lr` (paper, Table 15)."""

    lr: float = number(1e-4, at_least=0)
    min_lr: float = number(1e-6, at_least=0)
    warmup_steps: int = number(1000, at_least=0)
    beta1: float = number(0.9, at_least=0)
    beta2: float = number(0.98, at_least=0)
    eps: float = number(1e-6, at_least=0)
    weight_decay: float = number(0.05, at_least=0)
    clip_grad: float = number(1.0, at_least=0)
    vision_layer_decay: float = number(1.0, at_least=0)  # paper: 0.9, per ViT layer from the top


@dataclass
class TrainConfig:
    """Length, batch and precision of a run, its log and its checkpoints; intervals are steps."""

    steps: int = number(42500, at_least=1)
    epochs: int = number(0, at_least=0)  # over data.sources, in place of steps; 0: steps
    global_batch_size: int = number(8192, at_least=1)
    micro_batch_size: int = number(16, at_least=1)
    precision: Precision = "bf16"
    seed: int = number(1234, at_least=0)
    log_interval: int = number(10, at_least=1)
    save_interval: int = number(1000, at_least=1)
    keep_last: int = number(0, at_least=0)  # newest checkpoints that stay; 0 keeps all
    keep_every: int = number(0, at_least=0)  # checkpoints of steps divisible by it stay for good
    async_save: bool = True  # write checkpoints while the training goes on
    output: str = ""


@dataclass
class ValidationConfig:
    """Loss on data that is not trained on, each source by itself; `interval` is steps, 0 never."""

    sources: list[str] = field(default_factory=list)  # sharded data sets, folders or URLs
    interval: int = number(0, at_least=0)
    samples: int = number(1024, at_least=0)  # of each source, spread evenly over it; 0: all


@dataclass
class HealthConfig:
    """Limits for steps that hang, spike or are not finite."""

    # Seconds of one step, after which stacks are dumped and the run ends; 0: never.
    step_timeout: float = number(1800.0, at_least=0)
    # Multiple of the running median of the gradient norm above which a step is skipped; 0: never.
    spike_factor: float = number(0.0, at_least=0)
    # Steps skipped in a row (NaN or spike) after which the run stops.
    max_skipped: int = number(5, at_least=1)


@dataclass
class WatchConfig:
    """Images of samples, MFU and profiles; intervals are steps, 0 is never."""

    picture_interval: int = number(0, at_least=0)  # sheet of samples as the model gets them
    # Peak of one device in bf16, for MFU; 0: by the device's name.
    peak_tflops: float = number(0.0, at_least=0)
    profiler: Literal["none", "torch", "nsys"] = "none"
    profile_step: int = number(10, at_least=1)  # first step of this process to be profiled
    profile_steps: int = number(3, at_least=1)


@dataclass
class WandbConfig:
    """Logging to Weights & Biases."""

    enabled: bool = False
    project: str = "megatron-owl2"
    mode: Literal["offline", "online"] = "offline"


@dataclass
class RunConfig:
    """The whole configuration of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
