"""Makes this folder with Hugging Face transformers 5.23 (not needed to run the tests).

llama/ is a LlamaForCausalLM with grouped-query attention, clip/ a whole CLIPModel, both random.
reference.safetensors: `pixels` [2, 3, 28, 28] and the ViT's `features` after its last norm, `ids`
[2, 9] and the LLaMA's `logits`.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent


def random_weights(model, spread):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * spread)
    return model.eval()


torch.manual_seed(0)
llama = random_weights(
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_theta=500.0,
        )
    ),
    0.5,
)
clip = random_weights(
    CLIPModel(
        CLIPConfig(
            text_config={
                "vocab_size": 16,
                "hidden_size": 8,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            vision_config={
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "image_size": 28,
                "patch_size": 7,
            },
            projection_dim=8,
        )
    ),
    0.5,
)
pixels, ids = torch.randn(2, 3, 28, 28), torch.randint(0, 64, (2, 9))
with torch.no_grad():
    vision = clip.vision_model
    features = vision.post_layernorm(vision(pixels).last_hidden_state)
    logits = llama(ids).logits
llama.save_pretrained(HERE / "llama")
clip.save_pretrained(HERE / "clip")
save_file(
    {"pixels": pixels, "features": features, "ids": ids, "logits": logits},
    HERE / "reference.safetensors",
)
