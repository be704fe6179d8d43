"""What weights are for, as the graphs tell: on networks whose roles everybody knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import schemas  # noqa: F401 (torchvision asks for its ops on a torch that has none)
import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.plan import Role, locate
from dynrank_fx.plan.roles import roles_of

SAMPLES = str(Path(__file__).parents[2] / "samples")
ALL = tuple(Role)
CAPTURES = (dr.Capture.SYMBOLIC, dr.Capture.EXPORT)


def found(model: nn.Module, *inputs: Tensor, how: dr.Capture = dr.Capture.SYMBOLIC) -> dict[Role, set[str]]:
    roles = roles_of(locate(dr.capture(model.eval(), inputs, how=how)))
    return {role: {name for name, each in roles.items() if each is role} for role in Role}


@pytest.mark.parametrize(
    ("name", "blocks", "how"),
    [
        pytest.param("resnet18", 3, dr.Capture.EXPORT, marks=pytest.mark.fuzz),
        ("resnet18", 3, dr.Capture.SYMBOLIC),
        ("resnet50", 4, dr.Capture.SYMBOLIC),
    ],
    ids=str,
)
def test_a_resnet(name, blocks, how):
    torchvision = pytest.importorskip("torchvision")
    model = getattr(torchvision.models, name)(weights=None)
    roles = found(model, torch.zeros(2, 3, 64, 64), how=how)
    assert roles[Role.STEM] == {"conv1.weight"}
    assert roles[Role.HEAD] == {"fc.weight"}
    expected = {f"layer{i}.0.downsample.0.weight" for i in range(5 - blocks, 5)}
    assert roles[Role.SHORTCUT] == expected, "and no other 1×1 convolution, of which a bottleneck has two"


class LanguageModel(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return torch.log_softmax(self.head(x + self.mix(x)), -1)


@pytest.mark.parametrize("how", CAPTURES, ids=lambda how: how.name)
def test_a_language_model_whose_tied_embedding_is_neither(how):
    tokens = torch.zeros(2, 5, dtype=torch.long)
    roles = found(LanguageModel(tied=False), tokens, how=how)
    assert roles == {Role.STEM: {"embed.weight"}, Role.SHORTCUT: set(), Role.HEAD: {"head.weight"}}
    assert not any(found(LanguageModel(tied=True), tokens, how=how).values())


def test_a_wide_residual_network_and_the_digits_sample(monkeypatch):
    monkeypatch.syspath_prepend(SAMPLES)
    import digits
    import wrn28

    for model, x, shortcuts in (
        (
            wrn28.WideResNet(10, 1),
            torch.zeros(2, 3, 32, 32),
            {"stages.1.0.shortcut.weight", "stages.2.0.shortcut.weight"},
        ),
        (digits.DigitNet(), torch.zeros(2, 1, 8, 8), {"blocks.1.shortcut.0.weight"}),
    ):
        roles = found(model, x)
        assert len(roles[Role.STEM]) == 1
        assert next(iter(roles[Role.STEM])).startswith("stem")
        assert roles[Role.SHORTCUT] == shortcuts
        assert roles[Role.HEAD] == {"head.weight"}


def test_the_first_linear_of_a_perceptron_is_no_stem_and_the_last_of_a_residual_one_no_classifier():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(torch.tanh(self.a(x)))

    assert not any(found(Residual(), torch.zeros(2, 16)).values())
    plain = found(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.zeros(2, 16))
    assert plain == {Role.STEM: set(), Role.SHORTCUT: set(), Role.HEAD: {"2.weight"}}


def test_a_plan_leaves_them_dense_and_says_so_but_an_override_knows_better(monkeypatch):
    monkeypatch.syspath_prepend(SAMPLES)
    import digits

    x = (torch.zeros(2, 1, 8, 8),)
    plan = dr.plan_of(dr.transform(digits.DigitNet(), x, leave=ALL))
    reasons = {skipped.name: skipped.reason for skipped in plan.skipped}
    assert reasons == {
        "stem.0.weight": "the stem: it reads the model's input",
        "blocks.1.shortcut.0.weight": "a shortcut: a 1×1 convolution beside other layers",
        "head.weight": "the classifier: it gives the model's output",
    }
    asked = {"*shortcut*": dr.Override(rank=dr.Fixed(8))}
    plan = dr.plan_of(dr.transform(digits.DigitNet(), x, leave=ALL, overrides=asked))
    assert "blocks.1.shortcut.0.weight" in {row.site.name for row in plan.sites}
