# library: mlx-lm-lora
# file: mlx_lm_lora/trainer/grpo_trainer.py
"""MLX-LM-LoRA's group advantages, which are NumPy; its loss needs MLX."""

# note: it raises on a NaN reward by design, where no other reward function has a value.

import numpy

from checks.alone import Stub, load_alone

mlx = Stub(array=lambda x, dtype=None: numpy.asarray(x, "float32"))
trainer = load_alone(
    "mlx_lm_lora", "trainer/grpo_trainer.py", mlx__core=mlx,
    mlx_lm_lora__trainer__sft_trainer=Stub(SFTTrainingArgs=object),
)  # fmt: skip


def group_advantages(rewards):
    P, G = rewards.shape
    reward, texts = lambda **batch: rewards.flatten().tolist(), [""] * (P * G)
    reward.__name__ = "reward"
    groups = [i // G for i in range(P * G)]
    return trainer.calculate_rewards_and_advantages(
        [reward], texts, texts, texts, texts, groups, sorted({*groups})
    )[0].reshape(P, G)
