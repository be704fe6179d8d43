"""What ``save_pretrained`` says when it writes factors: ``from_pretrained`` would fill their weights at random."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemas  # noqa: F401 (torchvision's operators, which transformers may ask for)
import torch
from torch import Tensor, nn

import dynrank_fx as dr

IDS = torch.tensor([[5, 9, 3, 17, 20, 2, 31, 8]])
IN_LOW = (
    r"^save_pretrained writes factors in the place of transformer\.h\.0\.attn\.c_attn\.weight and 3 more, which "
    r"from_pretrained fills with random values: call enter_\(net, Phase\.FULL\) first, or keep the net by dr\.save$"
)
TRUNCATED = r"fills with random values: keep the model by torch\.save\(model, path\)$"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Hugging Face's own warnings are none of ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        yield


def gpt2() -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 39}
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=1, n_head=2, **ends)
    ).eval()


def made() -> tuple[nn.Module, nn.Module]:
    model = gpt2()
    net = dr.transform(model, {"input_ids": IDS}, form=dr.Form.LAYERS, rank=dr.Fixed(4), exclude=["*wte*", "*wpe*"])
    return model, net


def read(folder: Path) -> Tensor:
    logits: Tensor = type(gpt2()).from_pretrained(folder).eval()(IDS).logits  # type: ignore[attr-defined]
    return logits


def test_in_full_it_writes_what_the_model_writes(tmp_path: Path) -> None:
    model, net = made()
    model.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    for number, each in enumerate((net, copy.deepcopy(net), pickle.loads(pickle.dumps(net)))):
        each.save_pretrained(tmp_path / str(number))
        files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("dense", str(number))]
        assert files[0] == files[1]


def test_in_low_and_truncated_it_says_that_the_file_is_not_for_from_pretrained(tmp_path: Path) -> None:
    model, net = made()
    dr.enter_(net, dr.Phase.LOW)
    for each in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with pytest.warns(dr.DynrankWarning, match=IN_LOW):
            each.save_pretrained(tmp_path)
    low = net(IDS).logits
    assert not torch.allclose(read(tmp_path), low, atol=1e-2), "that is why"
    small = dr.truncate(net)
    for each in (small, copy.deepcopy(small)):
        with pytest.warns(dr.DynrankWarning, match=TRUNCATED):
            each.save_pretrained(tmp_path)
    with pytest.warns(dr.DynrankWarning, match=r"place of h\.0\.attn\.c_attn\.weight and 3 more"):
        small.get_submodule("transformer").save_pretrained(tmp_path)  # type: ignore[operator]
    dr.enter_(net, dr.Phase.FULL)
    net.save_pretrained(tmp_path)  # type: ignore[operator]
    torch.testing.assert_close(read(tmp_path), low)
    net.save_pretrained(str(tmp_path), state_dict=model.state_dict())  # type: ignore[operator]
    assert torch.equal(read(tmp_path), model(IDS).logits)


def test_what_is_saved_of_a_truncated_model_needs_nothing_of_this_package(tmp_path: Path) -> None:
    _, net = made()
    dr.enter_(net, dr.Phase.LOW)
    small = dr.truncate(net)
    torch.save(small, tmp_path / "small.pt")
    code = (
        "import sys, torch, schemas; sys.modules['dynrank_fx'] = None; "
        f"small = torch.load({str(tmp_path / 'small.pt')!r}, weights_only=False); "
        f"print(small(torch.tensor({IDS.tolist()})).logits.tolist()); small.save_pretrained({str(tmp_path)!r})"
    )
    path = str(Path(__file__).parents[1] / "zoo")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(eval(done.stdout)), small(IDS).logits)


def test_what_was_truncated_is_transformed_again_and_still_says_so(tmp_path: Path) -> None:
    _, net = made()
    dr.enter_(net, dr.Phase.LOW)
    again = dr.transform(
        dr.truncate(net), {"input_ids": IDS}, form=dr.Form.LAYERS, rank=dr.Fixed(2), include=["*.left.*"]
    )
    assert len(dr.plan_of(again).sites) == 4
    with pytest.warns(dr.DynrankWarning, match=r"c_attn\.weight and 3 more"):
        again.save_pretrained(tmp_path)  # type: ignore[operator]


def test_a_method_that_the_user_has_put_there_stays() -> None:
    model = gpt2()
    vars(model)["save_pretrained"] = print
    net = dr.transform(model, {"input_ids": IDS}, form=dr.Form.LAYERS, rank=dr.Fixed(4), include=["*c_fc*"])
    assert vars(net)["save_pretrained"] is print


def test_any_model_with_such_a_method_says_so() -> None:
    """As those of huggingface_hub's PyTorchModelHubMixin, which are no models of transformers."""

    class Hub(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

        def save_pretrained(self, file: io.BytesIO) -> str:
            torch.save(self.state_dict(), file)
            return "saved"

    net = dr.transform(Hub(), (torch.randn(2, 16),), form=dr.Form.LAYERS, rank=dr.Fixed(2))
    assert net.save_pretrained(io.BytesIO()) == "saved"  # type: ignore[operator]
    dr.enter_(net, dr.Phase.LOW)
    with pytest.warns(dr.DynrankWarning, match="in the place of fc.weight, which"):
        assert net.save_pretrained(io.BytesIO()) == "saved"  # type: ignore[operator]
