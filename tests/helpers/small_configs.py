"""Configurations of small models that no files belong to."""

from megatron_owl2.config.schema import (
    AbstractorConfig,
    DataConfig,
    DecoderConfig,
    KernelConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
    VisionConfig,
)

STAGE_1 = ["vision_model.*", "abstractor.*", "*.linear_kv_vision.weight", "*.weight_vision"]


def run_config(
    *,
    hidden=256,
    kv_heads=8,
    length=128,
    layers=3,
    rows=2,
    precision="bf16",
    trainable=("*",),
    **by,
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            vision=VisionConfig(
                image_size=56, hidden_size=128, num_layers=3, num_heads=4, ffn_size=512
            ),
            abstractor=AbstractorConfig(num_queries=15, num_layers=3, num_heads=4, ffn_size=352),
            decoder=DecoderConfig(
                vocab_size=1024,
                hidden_size=hidden,
                num_layers=layers,
                num_heads=8,
                num_kv_heads=kv_heads,
                ffn_size=688,
            ),
        ),
        data=DataConfig(sequence_length=length),
        stage=StageConfig(trainable=list(trainable)),
        train=TrainConfig(precision=precision, micro_batch_size=rows),
        parallel=ParallelConfig(**by),
        kernels=KernelConfig(elementwise="plain"),  # a CPU's, wherever it is planned
    )
