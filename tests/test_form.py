"""The form of layers: a net of the model's own class, with its methods and its code, in every phase and at the end.

The truth is the original model: its outputs, bit by bit in FULL, and the tokens that it generates.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr

LAYERS = dr.Form.LAYERS
IDS = torch.tensor([[5, 9, 3, 17, 20, 2, 31, 8], [7, 7, 4, 11, 30, 6, 1, 12]])


class Detector(nn.Module):
    """A user's class: constants, methods beside forward, and a branch on data."""

    names = ("cat", "dog")

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.stride = nn.Linear(32, 128), nn.Linear(128, 2), 8
        self.bare = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        return self.b(self.a(x.to(self.a.weight.dtype) @ self.bare).relu())

    def predict(self, x: Tensor) -> list[str]:
        return [self.names[int(i)] for i in self(x).argmax(1)]


def detector(**options: object) -> tuple[Detector, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Detector().eval(), torch.randn(4, 32)
    return model, dr.transform(model, (x,), form=LAYERS, rank=dr.Fixed(1), **options), x  # type: ignore[arg-type]


def test_the_net_is_of_the_models_class_with_its_methods_in_every_phase() -> None:
    model, net, x = detector()
    assert type(net) is Detector
    assert (net.names, net.stride) == (model.names, model.stride)
    assert net.predict(x) == model.predict(x)
    assert torch.equal(net(x), model(x))
    assert net.state_dict().keys() == model.state_dict().keys()
    dr.enter_(net, dr.Phase.LOW)
    low = net(x)
    small = dr.truncate(net)
    assert type(small) is Detector
    assert not any(type(module).__module__.startswith("dynrank_fx") for module in small.modules())
    assert torch.equal(small(x), low)
    assert small.predict(x) == net.predict(x)
    assert [type(layer) for layer in small.a] == [nn.Linear, nn.Linear]
    for each in (net, small):
        assert torch.equal(copy.deepcopy(each)(x), low)
        assert torch.equal(pickle.loads(pickle.dumps(each))(x), low)


def test_a_weight_that_code_asks_for_its_dtype_keeps_that_once_truncated() -> None:
    _, net, _ = detector()
    dr.enter_(net, dr.Phase.LOW)
    small = dr.truncate(net)
    assert (small.a.weight.dtype, small.a.weight.shape) == (torch.float32, (128, 32))
    assert bool(small.a.weight.isnan().all()), "no values: nobody should take it for the weight"
    assert not {name for name in small.state_dict() if name == "a.weight"}
    assert small.double()(torch.randn(2, 32).double()).dtype is torch.float64


def test_what_only_a_graph_reaches_is_listed_with_the_option_that_reaches_it() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.w = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x @ self.w)

    x = (torch.randn(2, 16),)
    plan = dr.plan_of(dr.transform(Turned(), x, form=LAYERS, rank=dr.Fixed(2)))
    assert [row.site.name for row in plan.sites] == ["fc.weight"]
    assert {each.name: each.reason for each in plan.skipped} == {
        "w": "only a graph reaches it: how=Capture.EXPORT in place of form=Form.LAYERS factors it"
    }
    assert len(dr.plan_of(dr.transform(Turned(), x, rank=dr.Fixed(2))).sites) == 2


def test_what_a_graph_would_not_reach_either_has_the_graphs_reason(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        """A class token and positions, as in a vision transformer."""

        def __init__(self) -> None:
            super().__init__()
            self.token, self.positions = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
            self.fc, self.rnn = nn.Linear(16, 16), nn.GRU(16, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
            return self.rnn(self.fc(x))[0]

    x = (torch.randn(2, 4, 16),)
    by_form = {form: dr.transform(Tokens(), x, form=form, rank=dr.Fixed(2)) for form in dr.Form}
    reasons = {form: [(each.name, each.reason) for each in dr.plan_of(net).skipped] for form, net in by_form.items()}
    assert reasons[LAYERS] == reasons[dr.Form.GRAPH]
    assert ("token", "not multiplied by an input as it is: it is used by `expand`") in reasons[LAYERS]
    dr.save(by_form[LAYERS], tmp_path / "net")
    assert dr.plan_of(dr.load(tmp_path / "net", Tokens(), x)).skipped == dr.plan_of(by_form[LAYERS]).skipped


def test_a_graph_that_is_asked_for_a_method_names_the_form_that_has_it() -> None:
    class Plain(nn.Sequential):
        stride = 8

        def predict(self) -> None: ...

    x = (torch.randn(2, 16),)
    net = dr.transform(Plain(nn.Linear(16, 16)), x, rank=dr.Fixed(2))
    small = dr.compress(Plain(nn.Linear(16, 16)), x, dr.Budget(flops=0.5), [x]).module
    for each in (net, copy.deepcopy(net), dr.inline(net), dr.truncate(net), small):
        for name in ("predict", "stride"):
            assert not hasattr(each, name)
            with pytest.raises(AttributeError, match=rf"has no '{name}': transform\(\.\.\., form=dr.Form.LAYERS\)"):
                getattr(each, name)
        with pytest.raises(AttributeError, match="has no attribute 'other'"):
            _ = each.other
        for counts_off in (lambda: each[0], lambda: list(each)):  # noqa: B023
            with pytest.raises(
                TypeError, match=r"^a graph of Plain has no layers to be counted off: transform\(\.\.\., f"
            ):
                counts_off()
        assert each


@pytest.mark.filterwarnings("ignore:.*cut by plain SVD")
def test_a_truncated_graph_that_knows_this_is_still_torchs_own() -> None:
    class Plain(nn.Sequential):
        def predict(self) -> None: ...

    x = torch.randn(4, 16)
    small = dr.truncate(dr.transform(Plain(nn.Linear(16, 16)), (x,), rank=dr.Fixed(2)).eval())
    want = small(x)
    compiled = torch.compile(small, fullgraph=True, backend="eager")
    twins = copy.deepcopy(small), pickle.loads(pickle.dumps(small)), torch.export.export(small, (x,)).module()
    assert all(torch.equal(each(x), want) for each in (compiled, *twins))
    assert "dynrank" not in str(pickle.dumps(small))
    for twin in twins:
        with pytest.raises(AttributeError, match="object has no attribute 'predict'"):
            _ = twin.predict


def test_the_roles_come_from_a_graph_beside() -> None:
    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mid, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 20)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.head(self.mid(self.stem(x).relu()).mean((2, 3)))}

    plan = dr.plan_of(
        dr.transform(Convolutional(), (torch.randn(2, 3, 12, 12),), form=LAYERS, rank=dr.Fixed(2), leave=tuple(dr.Role))
    )
    assert [row.site.name for row in plan.sites] == ["mid.weight"]
    reasons = {each.name: each.reason for each in plan.skipped}
    assert reasons == {"stem.weight": dr.Role.STEM.value, "head.weight": dr.Role.HEAD.value}


def test_roles_that_nothing_tells_are_said_to_be_unknown() -> None:
    with pytest.warns(dr.DynrankWarning, match="the roles of the weights are not known"):
        detector(leave=(dr.Role.HEAD,))


def test_it_is_saved_loaded_compressed_and_exported(tmp_path: Path) -> None:
    model, net, x = detector()
    dr.enter_(net, dr.Phase.LOW)
    dr.save(net, tmp_path / "net")
    again = dr.load(tmp_path / "net", Detector(), (x,))
    assert type(again) is Detector
    assert torch.equal(again.eval()(x), net(x))
    deep = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    small = dr.compress(deep, (x,), dr.Budget(params=0.5), [x], form=LAYERS)
    assert type(small.module) is nn.Sequential
    assert all(layer.right.out_features < 32 for layer in small.module)
    report = dr.export_onnx(small.module, (x,), tmp_path / "small.onnx")
    assert report.params == sum(p.numel() for p in small.module.parameters())
    assert type(model) is Detector


def test_the_weights_may_stay_the_models_own() -> None:
    model, net, x = detector(copy=False)
    assert net.a._parameters["weight"] is model.a.weight
    assert torch.equal(net(x), model(x))


# Models that people have


def transformer(name: str) -> nn.Module:
    import schemas  # noqa: F401 (torchvision's operators, which transformers may ask for)
    import transformers as hf

    torch.manual_seed(0)
    small = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    wide = {**small, "intermediate_size": 64}
    grouped = {**wide, "num_key_value_heads": 1, "max_position_embeddings": 64}
    ends = {"bos_token_id": 1, "eos_token_id": 39, "pad_token_id": 0}
    makers: dict[str, Callable[[], nn.Module]] = {
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=2, **ends)
        ),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**grouped, **ends)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**grouped, **ends, tie_word_embeddings=True)),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=40, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
            )
        ),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**wide, max_position_embeddings=64)),
    }
    return makers[name]().eval()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Hugging Face's own warnings are none of ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        yield


def generated(model: nn.Module, **settings: bool) -> Tensor:
    tokens: Tensor = model.generate(  # type: ignore[operator]
        IDS[:1, :4], attention_mask=torch.ones(1, 4), max_new_tokens=6, do_sample=False, **settings
    )
    return tokens


GENERATES = ("gpt2", "llama", "qwen2", "t5")


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "t5", *(pytest.param(name, marks=pytest.mark.fuzz) for name in ("qwen2", "bert"))]
)
def test_a_default_config_generates_and_computes_as_the_model_does(name: str, tmp_path: Path) -> None:
    model, example = transformer(name), {"input_ids": IDS, "labels": IDS.clone()}
    net = dr.transform(model, example, form=LAYERS, rank=dr.Ratio(0.25)).eval()
    assert type(net) is type(model)
    plan = dr.plan_of(net)
    assert not plan.skipped
    assert sum(row.site.flops or 0 for row in plan.sites) > 0.5 * (plan.total_flops or 0)
    assert all(row.site.flops for row in plan.sites if row.site.uses[0].op.kind != "embedding")
    ours, theirs = net(**example), model(**example)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    unlabelled = {"input_ids": IDS} if name != "t5" else {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    assert torch.equal(net(**unlabelled).logits, model(**unlabelled).logits)
    net.save_pretrained(tmp_path)  # type: ignore[operator]
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(**example).logits, theirs.logits)  # type: ignore[attr-defined]
    if name in GENERATES:
        for cached in (True, False):
            assert torch.equal(generated(net, use_cache=cached), generated(model, use_cache=cached))
    dr.enter_(net, dr.Phase.LOW)
    small = dr.truncate(net)
    assert type(small) is type(model)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in net.parameters())
    torch.testing.assert_close(small(**example).logits, net(**example).logits)
    if name in GENERATES:
        assert torch.equal(generated(small, use_cache=True), generated(net, use_cache=False))
    for each in (net, small):  # tied factors are written once
        with pytest.warns(dr.DynrankWarning, match="save_pretrained writes factors in the place of"):
            each.save_pretrained(tmp_path)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.fuzz)])
def test_query_key_and_value_share_one_factor(name: str, tmp_path: Path) -> None:
    model, example = transformer(name), {"input_ids": IDS, "labels": IDS.clone()}
    net = dr.transform(model, example, form=LAYERS, rank=dr.Ratio(0.25), share_inputs=True).eval()
    plan = dr.plan_of(net)
    assert {3} <= {len(row.sharing) for row in plan.sites}
    assert torch.equal(net(**example).logits, model(**example).logits)
    dr.enter_(net, dr.Phase.LOW)
    small = dr.truncate(net)
    assert plan.low_params == sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in small.parameters())
    assert torch.equal(generated(small, use_cache=True), generated(net, use_cache=False))
    for each in (net, small):  # the factor is written once
        with pytest.warns(dr.DynrankWarning, match="save_pretrained writes factors in the place of"):
            each.save_pretrained(tmp_path)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_tied_embeddings_that_stay_dense_are_resized_in_every_phase(name: str) -> None:
    model, example = transformer(name), {"input_ids": IDS, "labels": IDS.clone()}
    dense = {"gpt2": ["*.wte", "*.wpe"], "qwen2": ["*.embed_tokens"]}[name]
    net = dr.transform(model, example, form=LAYERS, rank=dr.Ratio(0.25), exclude=dense).eval()
    for phase in (dr.Phase.FULL, dr.Phase.LOW):
        dr.enter_(net, phase)
        for each in (copy.deepcopy(net), dr.truncate(net)):
            expected = each(**example).logits
            each.tie_weights()  # type: ignore[operator]
            each.resize_token_embeddings(44)  # type: ignore[operator]
            assert each.get_output_embeddings().weight is each.get_input_embeddings().weight  # type: ignore[operator]
            torch.testing.assert_close(each(**example).logits[..., :40], expected)


def test_activation_checkpoints_and_other_attention_work_in_every_phase() -> None:
    model, example = transformer("llama"), {"input_ids": IDS, "labels": IDS.clone()}
    net = dr.transform(model, example, form=LAYERS, rank=dr.Ratio(0.25)).train()
    for phase in (dr.Phase.FULL, dr.Phase.LOW):
        dr.enter_(net, phase)
        gradients = []
        for checkpoints in (False, True):
            net.zero_grad()
            if checkpoints:
                net.gradient_checkpointing_enable()  # type: ignore[operator]
            net(**example).loss.backward()
            gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        net.gradient_checkpointing_disable()  # type: ignore[operator]
        assert all(map(torch.equal, *gradients))
        eager = net.eval()(**example).logits
        net.set_attn_implementation("eager")  # type: ignore[operator]
        torch.testing.assert_close(net(**example).logits, eager)
        net.set_attn_implementation("sdpa")  # type: ignore[operator]
        net.zero_grad()
        net.train()


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.fuzz), "llama", "t5"])
def test_what_was_trained_with_checkpoints_is_cut_saved_loaded_and_exported(name: str, tmp_path: Path) -> None:
    """Hugging Face puts a hook on the embeddings then, which stays; and a file gives no cache of keys and values."""
    example = {"input_ids": IDS, "labels": IDS.clone()}
    net = dr.transform(transformer(name), example, form=LAYERS, rank=dr.Ratio(0.25)).train()
    net.gradient_checkpointing_enable()  # type: ignore[operator]
    net(**example).loss.backward()
    net.zero_grad()
    dr.enter_(net, dr.Phase.LOW)
    small = dr.truncate(net)
    expected = small(**example).logits
    assert torch.equal(copy.deepcopy(small)(**example).logits, expected)
    small.disable_input_require_grads()  # type: ignore[operator] # its hook is no function that pickle knows
    torch.save(small, tmp_path / "small.pt")
    for each in (copy.deepcopy(small), torch.load(tmp_path / "small.pt", weights_only=False)):
        assert torch.equal(each(**example).logits, expected)
    if name != "t5":
        assert dr.export_onnx(small, {"input_ids": IDS}, tmp_path / "small.onnx").params > 0
        assert small.config.use_cache


def test_a_hook_on_a_layer_stays_and_is_refused_by_a_graph() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), torch.randn(2, 16)
    calls: list[int] = []
    for form in dr.Form:
        net = dr.transform(model, (x,), form=form, rank=dr.Fixed(2))
        net.get_submodule("0").register_forward_hook(lambda *_: calls.append(1))
        if form is LAYERS:
            dr.truncate(net, [x])(x)
            assert calls[-1:] == [1]
        else:
            with pytest.raises(dr.PlanError, match=r"^0\.weight has a hook, which a graph without its sites"):
                dr.truncate(net, [x])


@pytest.mark.parametrize("wrong", ["layers", "layer", True, None])
def test_what_is_no_form_is_refused(wrong: object) -> None:
    with pytest.raises(dr.PlanError, match=r"is no form: give one of Form\.GRAPH, Form\.LAYERS"):
        dr.transform(nn.Linear(8, 8), (torch.randn(2, 8),), form=wrong)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
def test_a_language_model_of_keyword_arguments_has_roles() -> None:
    example = {"input_ids": IDS, "labels": IDS.clone()}
    model = transformer("llama").train()
    model.get_submodule("model.norm").eval()
    net = dr.transform(model, example, form=LAYERS, rank=dr.Ratio(0.25), leave=tuple(dr.Role))
    assert (model.training, model.get_submodule("model.norm").training) == (True, False)
    reasons = {each.name: each.reason for each in dr.plan_of(net).skipped}
    assert reasons["model.embed_tokens.weight"] == dr.Role.STEM.value


def test_a_timm_model_keeps_its_methods() -> None:
    import schemas  # noqa: F401
    import timm

    torch.manual_seed(0)
    model, x = timm.create_model("test_vit", num_classes=7).eval(), torch.randn(2, 3, 160, 160)
    net = dr.transform(model, (x,), form=LAYERS, rank=dr.Ratio(0.25), exclude=["head.weight"]).eval()
    reasons = {each.name: each.reason for each in dr.plan_of(net).skipped}
    assert all(reasons[name].startswith("not multiplied by an input") for name in ("cls_token", "pos_embed"))
    assert torch.equal(net.forward_features(x), model.forward_features(x))  # type: ignore[operator]
    dr.enter_(net, dr.Phase.LOW)
    small = dr.truncate(net)
    torch.testing.assert_close(small.forward_features(x), net.forward_features(x))  # type: ignore[operator]
    small.reset_classifier(3)  # type: ignore[operator]
    assert small(x).shape == (2, 3)
