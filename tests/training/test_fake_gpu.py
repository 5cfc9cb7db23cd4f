"""A training step on a GPU that is not there: torch's fake tensors compute shapes, types and devices, and
refuse operations that mix devices. Augmentation, mixing, dual BN, both losses, half precision.

PyTorch's engine runs a backward pass on a real GPU alone, so gradients are given here; of our own, dual
BN's, the code is called.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ray_synth.config import TrainingConfig
from ray_synth.storage.folder import Folder
from ray_synth.training import recipe
from ray_synth.training.augmentation import POLICIES
from ray_synth.training.bn_kernels import _NormaliseParts
from ray_synth.training.dual_bn import DualBatchNorm, convert_dual_bn, domain_split, use_bn
from ray_synth.training.job import TrainJob
from ray_synth.training.learner import Learner
from ray_synth.training.prefetch import Prepared

GPU = torch.device("cuda", 0)
NAMES = tuple("abcde")


class FakeGpu(FakeTensorMode):
    """It never asks CUDA for the device itself, whatever `torch.cuda.is_available` says."""

    avoid_device_init = True


@pytest.fixture
def gpu(monkeypatch) -> Iterator[FakeTensorMode]:
    """Fake tensors say that they are on a GPU; what needs a real one is answered as by one."""
    mode, to = FakeGpu(allow_non_fake_inputs=True), nn.Module.to
    generator = torch.Generator

    def moved(model: nn.Module, *place, **where) -> nn.Module:
        with mode:
            return to(model, *place, **where)

    monkeypatch.setattr(nn.Module, "to", moved)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr("ray.train.torch.prepare_model", lambda model, **_: model)
    matmul = torch.get_float32_matmul_precision()
    benchmark = torch.backends.cudnn.benchmark
    yield mode
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.benchmark = benchmark


def learner_of(**settings) -> Learner:
    values = {
        "steps": 4, "model": "test_resnet", "image_size": 32, "batch_size": 12, "real_fraction": 0.5,
        "dtype": "bfloat16", "augment": "imagenet_strong", **settings,
    }  # fmt: skip
    job = TrainJob(
        "mixed", TrainingConfig(**values), 4, NAMES, 0, Folder("."), None, 1, num_synthetic=1
    )
    return Learner(job, GPU, 0, 1)


def batch(learner: Learner, rows: int = 12) -> Prepared:
    """As the prefetcher makes one: pixels copied to the GPU, then augmented and mixed there."""
    size = learner.config.image_size
    images = torch.zeros(rows, 3, size, size, dtype=torch.uint8).to(GPU)
    labels = torch.arange(rows).remainder(5).to(GPU)
    x, targets = learner.finish(images, labels, 0)
    return Prepared(x, labels, targets, ["x"] * rows)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1},
        {"mixup": 0.2, "loss": "binary_cross_entropy", "target_threshold": 0.2,
         "optimizer": {"name": "lamb", "lr": 0.005}},
        {"model": "test_efficientnet", "optimizer": {"name": "sgd", "lr": 0.1}, "accumulate_steps": 2},
        {"model": "test_vit", "image_size": 160, "dual_layer_norm": True},
        {"dual_bn": False, "lambda_synth": 0.5, "lambda_end": 0.0, "dtype": "float32"},
        {"real_fraction": 0.25},
    ],
    ids=["plain", "mixed", "bce", "accumulated", "layer_norm", "shared", "quarter"],
)  # fmt: skip
def test_a_step_mixes_no_devices(gpu, settings, monkeypatch):
    learner = learner_of(**settings)
    assert {p.device for p in learner.model.parameters()} == {GPU}
    lost: list[torch.device] = []

    def backward(loss: torch.Tensor) -> None:
        lost.append(loss.device)
        for parameter in learner.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with gpu:
        batches = [batch(learner) for _ in range(learner.config.accumulate_steps)]
        assert {t.device for b in batches for t in b[:3]} == {GPU}
        assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
        loss, sums = learner.step(0, batches)
    assert loss.device == sums.device == GPU
    assert lost == [GPU] * learner.config.accumulate_steps
    assert loss.shape == () and sums.shape == (6,)
    for name, parameter in learner.model.named_parameters():
        state = learner.optimizer.state[parameter]
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                assert value.device == GPU, (name, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_of_dual_bn_mixes_no_devices(gpu, dtype):
    kept: list[torch.Tensor] = []
    context = SimpleNamespace(needs_input_grad=[True], save_for_backward=lambda *t: kept.extend(t))
    with gpu:
        x = torch.zeros(6, 4, 3, 3, device=GPU, dtype=dtype)
        norms = [torch.ones(4, device=GPU) for _ in range(4)]
        out = _NormaliseParts.forward(
            context, x, [4, 2], (1e-5, 1e-5), *norms, 0.1, *(n.clone() for n in norms), 0.1
        )
        assert (out.device, out.dtype, out.shape) == (GPU, dtype, x.shape)
        context.saved_tensors = tuple(kept)
        grads = _NormaliseParts.backward.__wrapped__(context, torch.ones_like(out))
    given = [grad for grad in grads if grad is not None]
    assert [grad.shape for grad in given] == [x.shape, *[torch.Size([4])] * 4]
    assert {grad.device for grad in given} == {GPU}


@pytest.mark.parametrize("policy", POLICIES)
def test_augmentation_stays_on_the_gpu(gpu, policy):
    learner = learner_of(augment=policy)
    everything = {"policy": policy, "noise": 0.1, "invert": 0.2, "shear": 5, "erase": 0.5}
    for augment in (policy, everything):
        learner = learner_of(augment=augment)
        with gpu:
            made = batch(learner)
        assert made.images.device == GPU
        assert made.images.dtype == torch.float32


def test_half_precision_is_that_of_the_layers(gpu):
    model = convert_dual_bn(recipe.build_model("test_resnet", num_classes=5))
    seen: dict[type, torch.dtype] = {}
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | DualBatchNorm):
            module.register_forward_hook(lambda m, _, out: seen.update({type(m): out.dtype}))
    model = model.to(device=GPU, memory_format=torch.channels_last).train()
    with gpu, domain_split(model, 4, 2), torch.autocast("cuda", torch.bfloat16):
        logits = model(torch.zeros(6, 3, 32, 32, device=GPU))
    assert logits.dtype == torch.bfloat16
    assert set(seen.values()) == {torch.bfloat16}


@pytest.mark.parametrize("bn", ["main", "aux", "average"])
def test_testing_a_dual_bn_model_mixes_no_devices(gpu, bn):
    model = convert_dual_bn(recipe.build_model("test_efficientnet", num_classes=5)).eval()
    model = model.to(device=GPU)
    with gpu, use_bn(model, bn), torch.inference_mode():
        assert model(torch.zeros(2, 3, 64, 64, device=GPU)).device == GPU


def test_the_check_sees_what_it_is_for(gpu):
    """What stayed on the CPU, as a forgotten `.to(device)` leaves it."""
    learner = learner_of()
    with gpu:
        made = batch(learner)
        with pytest.raises(RuntimeError, match=r"(?i)device"):
            made.images + torch.zeros(12, 3, 32, 32)
        with pytest.raises(RuntimeError, match=r"(?i)device"):
            learner.step(0, [made._replace(targets=torch.zeros(12, dtype=torch.long))])
