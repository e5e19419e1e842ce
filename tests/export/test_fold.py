"""Each fold: how often it was made, what is left, equal results; and where it must not be made, the reason."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import pytest
import torch
from fold_networks import (
    CalledTwice,
    DataDependent,
    Factor,
    InPlace,
    IntoAView,
    Keywords,
    Normalised,
    Residual,
    TwoConvolutions,
    UsedTwice,
    randomise,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import edgetrain
from edgetrain.export.fold import Plain
from edgetrain.export.folds.layers import keeps_shape

BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}


def folded(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Plain:
    """The folded model, which agrees with the model in ``dtype``; the model itself is as it was."""
    model = randomise(model.to(dtype))
    torch.manual_seed(2)
    x = torch.randn(shape, dtype=dtype)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model(x.clone())
        plain = edgetrain.fold(model)
        after, again = plain(x.clone()), model(x.clone())
    assert float((before - after).abs().max() / before.abs().max()) <= BOUNDS[dtype]
    assert torch.equal(before, again)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not plain.training
    assert set(plain.origins) == {name for name, _ in (*plain.named_parameters(), *plain.named_buffers())}
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert {source for sources in plain.origins.values() for source in sources} <= known
    return plain


def operations(plain: Plain) -> Counter[str]:
    """How often each layer, function and method is called."""
    return Counter(
        type(plain.get_submodule(str(node.target))).__name__
        if node.op == "call_module"
        else getattr(node.target, "__name__", str(node.target))
        for node in plain.graph.nodes
        if node.op.startswith("call")
    )


def done(plain: Plain, kind: str) -> int:
    return sum(fold.kind == kind for fold in plain.report.done)


def kept(plain: Plain, kind: str = "batch norm") -> list[str]:
    return [fold.reason for fold in plain.report.skipped if fold.kind == kind]


LAYERS = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), 6),
    "without bias": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), 6),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding="same"), 6),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"), 4),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), 6),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False), 6),
}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_batch_norm_goes_into_the_layer_before_it(name: str, dtype: torch.dtype) -> None:
    make, channels = LAYERS[name]
    plain = folded(nn.Sequential(make(), nn.BatchNorm2d(channels), nn.ReLU()), (2, 4, 9, 9), dtype)
    assert done(plain, "batch norm") == 1
    assert sum(operations(plain).values()) == 2
    assert plain.report.skipped == ()
    assert set(plain.origins["0.weight"]) == {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"}


def test_the_folded_weight_is_gamma_w_over_sigma() -> None:
    """Ioffe and Szegedy 2015 on one number: 3 (2 x - 5) / sqrt(4) + 7 = 3 x - 0.5."""
    conv, norm = nn.Conv2d(1, 1, 1, bias=False).double(), nn.BatchNorm2d(1, eps=0.0).double()
    for tensor, value in ((conv.weight, 2.0), (norm.weight, 3.0), (norm.bias, 7.0)):
        nn.init.constant_(tensor, value)
    norm.running_mean.fill_(5.0)
    norm.running_var.fill_(4.0)
    plain = edgetrain.fold(nn.Sequential(conv, norm))
    assert plain.state_dict()["0.weight"].item() == 3.0
    assert plain.state_dict()["0.bias"].item() == -0.5


def test_other_numbers_of_dimensions() -> None:
    assert operations(folded(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 8))) == {"Conv1d": 1}
    assert operations(folded(nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (2, 2, 4, 4, 4))) == {"Conv3d": 1}
    assert operations(folded(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), (4, 3))) == {"Linear": 1}
    assert operations(folded(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5)), (4, 3))) == {"Linear": 1}


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, groups=2, padding="valid"),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2),
    ],
    ids=str,
)
def test_batch_norm_goes_into_the_convolution_after_it(conv: nn.Conv2d) -> None:
    plain = folded(nn.Sequential(nn.BatchNorm2d(4), copy.deepcopy(conv)), (2, 4, 7, 7))
    assert done(plain, "batch norm") == 1
    assert operations(plain) == {"Conv2d": 1}


def test_batch_norm_before_zero_padding_goes_only_without_shift() -> None:
    plain = folded(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), (2, 4, 7, 7))
    assert done(plain, "batch norm") == 0
    assert kept(plain) == ["it follows the input; 1 pads with zeros, which the shift would change"]
    model = nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 6, 3, padding=1))
    model[0].running_var.fill_(2.0)
    plain = edgetrain.fold(model)
    assert operations(plain) == {"Conv2d": 1}
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(plain(x), model.eval()(x))


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "used twice": (UsedTwice(), "the result of conv is used 2 times; it precedes add, which has no weights"),
    "called twice": (CalledTwice(), "conv is called 2 times"),
    "transposed after": (
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 3)),
        "it follows 0, which has no weights; 2 is a transposed convolution, whose outputs do not all sum over the same"
        " taps",
    ),
    "between activations": (
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()),
        "it follows 0, which has no weights; it precedes 2, which has no weights",
    ),
    "own statistics": (
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        "it normalises with the statistics of its input",
    ),
    "a summand without weights": (
        nn.Sequential(
            nn.ReLU(),
            Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        ),
        "it follows an addition: it follows 0, which has no weights; it precedes 3, which has no weights",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_batch_norm_that_stays_is_named(name: str) -> None:
    model, reason = REFUSED[name]
    plain = folded(copy.deepcopy(model), (3, 4, 6, 6))
    assert done(plain, "batch norm") == 0
    assert len(kept(plain)) == 1
    assert kept(plain)[0].startswith(reason)
    assert sum(count for name, count in operations(plain).items() if name.startswith("BatchNorm")) == 1


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_batch_norm_after_an_addition_of_two_layers(dtype: torch.dtype) -> None:
    plain = folded(TwoConvolutions(), (2, 4, 6, 6), dtype)
    assert done(plain, "batch norm") == 1
    assert operations(plain) == {"Conv2d": 2, "add": 1}
    assert "norm.running_mean" in plain.origins["left.bias"]


def test_a_residual_of_one_convolution_is_a_dirac_delta() -> None:
    for groups in (1, 2, 4):
        body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=groups), nn.BatchNorm2d(4))
        plain = folded(nn.Sequential(Residual(body), nn.BatchNorm2d(4)), (2, 4, 6, 6))
        assert (done(plain, "Dirac delta"), done(plain, "batch norm")) == (1, 2)
        assert operations(plain) == {"Conv2d": 1}
    assert operations(folded(Residual(nn.Linear(4, 4)), (3, 4))) == {"Linear": 1}


class TwoPaths(nn.Module):
    """norm(x) + inner(conv(x)), a training-time block of RepVGG."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(x) + self.inner(self.conv(x))).relu()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_batch_norm_on_the_identity_path_is_a_scaled_dirac_delta(dtype: torch.dtype) -> None:
    plain = folded(TwoPaths(), (2, 4, 6, 6), dtype)
    assert done(plain, "batch norm") == 2
    assert operations(plain) == {"Conv2d": 1, "relu": 1}
    assert set(plain.origins["conv.bias"]) >= {"norm.running_mean", "inner.running_mean"}


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(4, 4, 2, padding="same"),
        nn.ConvTranspose2d(4, 4, 3, padding=1),
    ],
    ids=str,
)
def test_a_convolution_that_changes_the_shape_takes_no_delta(conv: nn.Conv2d) -> None:
    assert not keeps_shape(conv)
    assert keeps_shape(nn.Conv2d(4, 4, 5, padding=4, dilation=2))


def test_a_residual_of_two_layers_stays() -> None:
    body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    plain = folded(Residual(body), (2, 4, 6, 6))
    assert done(plain, "Dirac delta") == 0
    assert operations(plain) == {"Conv2d": 2, "ReLU": 1, "add": 1}


class Scaled(nn.Module):
    """W -> a I + b W: the shape of a Dirac parameterisation, with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(0.3))

    def forward(self, weight: Tensor) -> Tensor:
        return self.a * nn.init.dirac_(torch.empty_like(weight)) + self.b * weight


def parametrised(kind: str) -> nn.Module:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    if kind == "any":
        parametrize.register_parametrization(conv, "weight", Scaled())
        parametrize.register_parametrization(conv, "bias", nn.Softplus())
    elif kind == "weight norm":
        weight_norm(conv)
    elif kind == "spectral norm":
        spectral_norm(conv)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            old = {"old weight norm": nn.utils.weight_norm, "old spectral norm": nn.utils.spectral_norm}[kind]
            old(conv)
    return conv


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("kind", "sources"),
    [
        ("any", {"parametrizations.weight.original", "parametrizations.weight.0.a", "parametrizations.weight.0.b"}),
        ("weight norm", {"parametrizations.weight.original0", "parametrizations.weight.original1"}),
        (
            "spectral norm",
            {"parametrizations.weight.original", "parametrizations.weight.0._u", "parametrizations.weight.0._v"},
        ),
        ("old weight norm", {"weight_g", "weight_v"}),
        ("old spectral norm", {"weight_orig", "weight_u", "weight_v"}),
    ],
)
def test_parametrised_weights_become_plain(kind: str, sources: set[str], dtype: torch.dtype) -> None:
    model = nn.Sequential(parametrised(kind), nn.BatchNorm2d(4), nn.ReLU()).to(dtype)
    if "norm" in kind:
        model.train()(torch.randn(2, 4, 6, 6, dtype=dtype))  # leaves a weight with a graph behind
    plain = folded(model, (2, 4, 6, 6), dtype)
    assert done(plain, "parametrisation") == (2 if kind == "any" else 1)
    assert operations(plain) == {"Conv2d": 1, "ReLU": 1}
    assert sorted(plain.state_dict()) == ["0.bias", "0.weight"]
    norm = {f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert set(plain.origins["0.weight"]) == {f"0.{name}" for name in sources} | norm


def test_a_classifiers_factor() -> None:
    plain = folded(Factor(), (2, 4, 5, 5))
    assert done(plain, "scale") == 1
    assert operations(plain) == {"mean": 1, "Linear": 1}


def test_input_normalisation_goes_whole_without_zero_padding() -> None:
    for options in ({}, {"padding": 1, "padding_mode": "replicate"}):
        plain = folded(Normalised(**options), (2, 3, 6, 6))
        assert done(plain, "input normalisation") + done(plain, "scale") == 2
        assert operations(plain) == {"Conv2d": 1}
        assert set(plain.origins["conv.bias"]) >= {"conv.bias", "mean", "std"}


def test_input_normalisation_keeps_its_subtraction_before_zero_padding() -> None:
    plain = folded(Normalised(padding=1), (2, 3, 6, 6))
    assert done(plain, "scale") == 1
    assert operations(plain) == {"sub": 1, "Conv2d": 1}
    (reason,) = kept(plain, "input normalisation")
    assert reason == "it follows the input; conv pads with zeros, which the shift would change"


def test_layers_may_be_called_with_their_input_by_name() -> None:
    plain = folded(Keywords(), (2, 4, 7, 7))
    assert (done(plain, "batch norm"), done(plain, "identity")) == (2, 1)
    assert operations(plain) == {"Conv2d": 1, "ReLU": 1, "BatchNorm2d": 1}


def test_operations_in_place_keep_their_meaning() -> None:
    plain = folded(InPlace(), (2, 4, 6, 6))
    assert done(plain, "batch norm") == 1
    assert not any(name.endswith("_") for name in operations(plain))


def test_a_write_into_a_view_leaves_the_module_whole() -> None:
    plain = folded(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), IntoAView()), (2, 4, 6, 6))
    assert done(plain, "batch norm") == 1
    assert kept(plain, "structure") == ["add_ writes in place into what may be a view"]
    assert kept(plain) == ["inside 2, which stays whole"]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_cannot_be_traced_is_folded_inside(sign: float) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), DataDependent()).double())
    model[1].weight.data.zero_()
    model[1].bias.data.fill_(sign)
    plain = edgetrain.fold(model)
    x = torch.randn(2, 4, 6, 6, dtype=torch.double)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    assert done(plain, "batch norm") == 2
    assert "data-dependent control flow in DataDependent.forward" in kept(plain, "structure")[0]
    assert kept(plain) == ["inside 2, which stays whole"]
    assert set(plain.origins["2.body.0.0.bias"]) >= {"2.body.0.bias", "2.body.1.running_mean"}


def test_a_model_that_cannot_be_traced_at_all() -> None:
    model = randomise(DataDependent().double())
    plain = edgetrain.fold(model)
    x = torch.randn(2, 4, 6, 6, dtype=torch.double)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    assert done(plain, "batch norm") == 1
    assert kept(plain) == ["inside network, which stays whole"]
    assert "body.1.bias" in plain.origins["network.body.0.0.bias"]


class Renamed(nn.Conv2d):
    """Another construction, the same layer."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)


class Doubling(nn.Conv2d):
    """Another layer under an inherited ``forward``."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2.0 * super()._conv_forward(x, weight, bias)


class Standardised(nn.Conv2d):
    """Its weight has mean 0 and variance 1, and it pads by hand."""

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = centred * torch.rsqrt(self.weight.var((1, 2, 3), keepdim=True) + 1e-5)
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), weight, self.bias, groups=self.groups)


def test_subclasses_of_layers() -> None:
    plain = folded(nn.Sequential(Renamed(4), nn.BatchNorm2d(4)), (2, 4, 6, 6))
    assert operations(plain) == {"Conv2d": 1}
    plain = folded(nn.Sequential(Doubling(4, 4, 3), nn.BatchNorm2d(4)), (2, 4, 6, 6))
    assert done(plain, "batch norm") == 1
    assert operations(plain) == {"Conv2d": 1}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_weight_that_is_computed_on_each_call(dtype: torch.dtype) -> None:
    plain = folded(nn.Sequential(Standardised(4, 6, 2, groups=2), nn.BatchNorm2d(6)), (2, 4, 6, 6), dtype)
    assert done(plain, "constant") == 6
    assert operations(plain) == {"pad": 1, "Conv2d": 1}
    assert set(plain.origins["conv2d.weight"]) == {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"}


def test_a_single_layer_is_a_network_too() -> None:
    plain = folded(nn.Conv2d(3, 4, 3), (1, 3, 5, 5))
    assert operations(plain) == {"Conv2d": 1}
    assert plain.origins["network.weight"] == ("weight",)


def test_a_layer_with_two_paths_is_called_twice() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(shared, nn.BatchNorm2d(4), nn.ReLU(), shared, nn.BatchNorm2d(4))
    plain = folded(model, (2, 4, 6, 6))
    assert done(plain, "batch norm") == 0
    assert [reason.partition(";")[0] for reason in kept(plain)] == ["0 is called 2 times"] * 2


def test_a_block_with_two_paths_is_plain_in_both() -> None:
    block = edgetrain.nn.ReversibleBlock(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1))
    plain = folded(nn.Sequential(block, nn.ReLU(), block), (2, 4, 6, 6))
    assert (done(plain, "plain layer"), plain.report.skipped) == (2, ())
    assert operations(plain)["Conv2d"] == 4


def test_a_folded_model_is_returned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    plain = edgetrain.fold(model)
    assert edgetrain.fold(plain) is plain


def test_a_copy_of_a_folded_network_keeps_its_report() -> None:
    plain = edgetrain.fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    twin = copy.deepcopy(plain)
    assert twin.report == plain.report
    assert twin.origins == plain.origins


def test_the_report_prints_as_a_table() -> None:
    plain = edgetrain.fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
    lines = str(plain.report).splitlines()
    assert lines[1].split() == ["done", "batch", "norm", "1", "into", "0"]
    assert lines[2].startswith("kept  batch norm  3      it follows 2, which has no weights")
