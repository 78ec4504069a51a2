"""Schema of a run's configuration: one dataclass per section of the YAML file.

Defaults are the paper's 7B model.
"""

from dataclasses import dataclass, field


@dataclass
class VisionConfig:
    """CLIP ViT-L/14; sizes in channels and layers, `image_size` and `patch_size` in pixels."""

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    ffn_size: int = 4096
    norm_eps: float = 1e-6  # the released model's value; OpenAI's CLIP has 1e-5
    position_init_std: float = 0.02  # only without a CLIP start

    @property
    def grid_size(self) -> int:
        return self.image_size // self.patch_size


@dataclass
class AbstractorConfig:
    """The visual abstractor; its width is the ViT's."""

    num_queries: int = 64
    num_layers: int = 6
    num_heads: int = 16
    ffn_size: int = 2816
    norm_eps: float = 1e-6  # of the inner feed-forward norm; the outer norms have 1e-5 always
    attention_init_std: float = 0.02  # query and key projections; wider makes the queries differ


MODALITY_SPLIT = ("input_norm", "key_value", "mlp_norm")


@dataclass
class DecoderConfig:
    """LLaMA-2 with modality-adaptive layers.

    `modality_split` names what has weights per modality in every layer: the norm before attention
    (paper, eq. 4), keys and values (eq. 5), the norm before the MLP. The released code splits all
    three; the paper's text shows [input_norm, key_value] only; [] is the plain LLaMA of Table 5.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    ffn_size: int = 11008
    max_positions: int = 2048
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    modality_split: list[str] = field(default_factory=lambda: list(MODALITY_SPLIT))


@dataclass
class ModelConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    abstractor: AbstractorConfig = field(default_factory=AbstractorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    image_mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    image_std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    init_std: float = 0.02

    @property
    def tokens_per_image(self) -> int:
        return self.abstractor.num_queries + 1  # vit_eos closes every image


@dataclass
class ParallelConfig:
    """How the model is laid over ranks; data parallelism takes what the others leave."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # parts of the decoder on every pipeline rank, interleaved
    context: int = 1  # ranks that share a sequence
    sequence: bool = False  # what tensor parallelism would hold twice is split along the sequence
    layers: list[int] = field(default_factory=list)  # of the decoder, per stage; [] is evenly
    recompute: str = "none"  # none | selective | full: again in the backward pass, not kept
    overlap: bool = True  # reduce gradients and gather parameters while the GEMMs run


@dataclass
class KernelConfig:
    """What computes the decoder's layers; ViT and abstractor stay on torch in `train.precision`."""

    backend: str = "local"  # local (torch) | transformer_engine
    fp8: str = "none"  # none | tensorwise | delayed | blockwise | mxfp8


@dataclass
class SourceConfig:
    """One sharded data set, a folder or a URL, and its share of the mixture."""

    path: str = ""
    weight: float = 1.0


@dataclass
class StorageConfig:
    """Shards behind a network: the cache on the node that they go through, and when to give up."""

    cache: str = ""  # folder on a local disk; needed if a source is a URL
    cache_gib: float = 50.0
    attempts: int = 6  # of a read, with growing pauses
    timeout: float = 60.0  # seconds of one request


@dataclass
class DataConfig:
    """What is read and how; `phase` is raised by one to go on with other sources or weights."""

    sources: list[SourceConfig] = field(default_factory=list)
    phase: int = 1
    tokenizer: str = ""
    sequence_length: int = 256  # after the placeholders are expanded into visual tokens
    workers: int = 2
    prefetch: int = 2  # micro-batches that every worker keeps ready
    stall_timeout: float = 1800.0  # seconds without a batch from the workers that end a run
    seed: int = 1234
    augment: bool = False  # random resized crop and flip; plain resize otherwise
    max_bad_fraction: float = 0.01
    max_bad_in_a_row: int = 100
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass
class StageConfig:
    """What a stage trains: what is trainable and not frozen. Patterns are shell globs over
    parameter names."""

    name: str = "pretrain"
    trainable: list[str] = field(default_factory=lambda: ["*"])
    frozen: list[str] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)  # pattern -> factor on the learning rate
    initial_checkpoint: str | None = None  # weights only; random weights without it


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and a cosine from `lr` to `min_lr` (paper, Table 15)."""

    lr: float = 1e-4
    min_lr: float = 1e-6
    warmup_steps: int = 1000
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.05
    clip_grad: float = 1.0
    vision_layer_decay: float = 1.0  # paper: 0.9, per ViT layer from the top


@dataclass
class TrainConfig:
    steps: int = 42500
    global_batch_size: int = 8192
    micro_batch_size: int = 16
    precision: str = "bf16"
    seed: int = 1234
    log_interval: int = 10
    save_interval: int = 1000
    keep_last: int = 0  # newest checkpoints that stay; 0 keeps all
    keep_every: int = 0  # checkpoints of steps divisible by it stay for good
    async_save: bool = True  # write checkpoints while the training goes on
    output: str = ""


@dataclass
class ValidationConfig:
    """Loss on data that is not trained on, each source by itself; `interval` is steps, 0 never."""

    sources: list[str] = field(default_factory=list)  # sharded data sets, folders or URLs
    interval: int = 0
    samples: int = 1024  # of each source, spread evenly over it; 0: all


@dataclass
class HealthConfig:
    """When a run that does not go well skips a step, and when it stops."""

    step_timeout: float = 1800.0  # seconds of one step, after which stacks are dumped; 0: never
    spike_factor: float = 0.0  # skip gradients so many times their running median norm; 0: never
    max_skipped: int = 5  # steps skipped in a row (NaN or spike) after which the run stops


@dataclass
class WatchConfig:
    """What a run shows beside its log line; intervals are steps, 0 is never."""

    picture_interval: int = 0  # samples as the model gets them, as a picture
    peak_tflops: float = 0.0  # of one device in bf16, for MFU; 0: by the device's name
    profiler: str = "none"  # none | torch | nsys
    profile_step: int = 10  # of this process, the first to be profiled
    profile_steps: int = 3


@dataclass
class WandbConfig:
    enabled: bool = False
    project: str = "megatron-owl2"
    mode: str = "offline"


@dataclass
class RunConfig:
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
