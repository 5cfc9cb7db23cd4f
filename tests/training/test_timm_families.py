"""Every family of timm: convert, evaluate as before, train a step, export to what plain timm loads.

The families and their members are read from timm's registry. A spread of them is in the default suite,
all of them in the slow one.
"""

import copy
import functools
import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from ray_synth.config import TrainingConfig
from ray_synth.storage.folder import Folder
from ray_synth.training import learner, recipe
from ray_synth.training.dual_bn import convert_dual_bn, domain_split, has_dual_bn, use_bn
from ray_synth.training.job import TrainJob
from ray_synth.training.state_dicts import export_aux, export_average, export_main

# Words in the names of small members, the smallest first.
SMALL = ("test_", "atto", "femto", "pico", "nano", "tiny", "micro", "small", "_xxs", "_xs", "_s0",
         "_b0", "_t0", "18", "10t", "050", "s12", "m1", "_t", "_s")  # fmt: skip
FAMILIES = sorted(module for module in timm.list_modules() if timm.list_models(module=module))
SPREAD = ["efficientnet", "inception_next", "maxxvit", "mobilevit", "resnet", "resnetv2",
          "vision_transformer", "xcit"]  # fmt: skip
LARGE = 60e6  # weights
# Families whose BatchNorm layers hold the activation.
ACTIVE = ["densenet", "efficientnet", "ghostnet", "mobilenetv3", "regnet", "rexnet"]


def smallest(family: str) -> str:
    """A small member, one with BatchNorm where there is one among the likely smallest three."""

    def likely(name: str) -> tuple[int, int, str]:
        return next((i for i, word in enumerate(SMALL) if word in name), 99), len(name), name

    def size(name: str) -> tuple[bool, int]:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=5)
        return not any_bn(model), sum(p.numel() for p in model.parameters())

    return min(sorted(timm.list_models(module=family), key=likely)[:3], key=size)


@functools.cache
def shallow(name: str) -> dict[str, int]:
    """What makes a large transformer two blocks deep: they are all alike, and 400 million weights at
    546 px take 16 GB to train."""
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=5)
        if sum(p.numel() for p in whole.parameters()) < LARGE:
            return {}
        try:
            timm.create_model(name, num_classes=5, depth=2)
        except TypeError:
            return {}
    return {"depth": 2}


def any_bn(model: torch.nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def batch_for(model: torch.nn.Module) -> torch.Tensor:
    """Six images of the smallest size that the model takes; two where that is a large one."""
    own = model.default_cfg["input_size"]
    for side in (64, 96, 128, own[-1]):
        x = torch.randn(6 if side < 384 else 2, own[0], side, side)
        try:
            with torch.no_grad():
                model.eval()(x[:1])
                model.train()(x)
        except Exception:
            if side == own[-1]:
                raise
            continue
        return x
    raise AssertionError


def take_through(family: str, caplog) -> None:
    torch.manual_seed(0)
    name = smallest(family)
    plain = timm.create_model(name, num_classes=5, **shallow(name))
    x = batch_for(copy.deepcopy(plain))
    plain.eval()
    with torch.no_grad():
        before = plain(x)
    with caplog.at_level(logging.WARNING):
        model = convert_dual_bn(copy.deepcopy(plain))
    if not any_bn(plain):
        assert not has_dual_bn(model)
        assert caplog.text.count("has no BatchNorm layer") == 1
    else:
        assert has_dual_bn(model)
    with torch.no_grad():
        assert torch.equal(model(x), before), f"{name}: conversion changed its output"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    with domain_split(model, len(x) * 2 // 3, len(x) - len(x) * 2 // 3):
        output = model(x)
    logits = output[0] if isinstance(output, tuple) else output
    F.cross_entropy(logits.flatten(1)[:, :5], torch.arange(len(x)) % 5).backward()
    # two rows of one value each give some families gradients of a million
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.eval()
    exports = {"main": export_main, "aux": export_aux, "average": export_average}
    for bn, export in exports.items() if has_dual_bn(model) else [("main", export_main)]:
        loaded = timm.create_model(name, num_classes=5, **shallow(name)).eval()
        loaded.load_state_dict(export(model), strict=True)
        with torch.no_grad(), use_bn(model, bn):
            if bn == "average":  # folded into one layer: equal but for rounding
                torch.testing.assert_close(loaded(x), model(x), rtol=1e-2, atol=1e-2)
            else:
                assert torch.equal(loaded(x), model(x)), f"{name}: the export of {bn} differs"


@pytest.mark.parametrize("family", SPREAD)
def test_a_spread_of_families_trains_and_exports(family, caplog):
    take_through(family, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in SPREAD])
def test_every_other_family_trains_and_exports(family, caplog):
    take_through(family, caplog)


def synchronise(family: str, monkeypatch) -> None:
    """BN over all workers: the learner's own conversion on a GPU that is not there, then its values."""
    torch.manual_seed(0)
    name = smallest(family)
    plain = timm.create_model(name, num_classes=5)
    if not any_bn(plain):
        return
    monkeypatch.setattr(recipe, "build_model", lambda *_, **__: copy.deepcopy(plain))
    mode, to = FakeTensorMode(allow_non_fake_inputs=True), nn.Module.to
    moved: list[nn.Module] = []

    def fake_to(model: nn.Module, **where) -> nn.Module:
        moved.append(copy.deepcopy(model))
        with mode:
            return to(model, **where)

    monkeypatch.setattr(nn.Module, "to", fake_to)
    for dual in (False, True):
        config = TrainingConfig(steps=1, sync_bn=True, dual_bn=dual, model=name)
        job = TrainJob("mixed", config, 1, tuple("abcde"), 0, Folder("."), None, 1, num_synthetic=1)
        built = learner._build(job, torch.device("cuda"), world_size=2)
        assert {p.device.type for p in built.parameters()} == {"cuda"}
        model = moved.pop()
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
        x = batch_for(copy.deepcopy(plain))
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), plain.eval()(x))
        if not dual:
            plain.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("family", [*ACTIVE, "resnet"])
def test_statistics_over_all_workers_keep_activations(family, monkeypatch):
    synchronise(family, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in (*ACTIVE, "resnet")])
def test_statistics_over_all_workers_keep_activations_in_every_other_family(family, monkeypatch):
    synchronise(family, monkeypatch)
