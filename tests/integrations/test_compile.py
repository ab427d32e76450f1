"""`torch.compile` and CUDA graphs over packed layers with LoRA: nothing may break the graph, nothing may change."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hqqplus import HqqPlusConfig
from hqqplus.integrations.peft import PackedLoraLinear
from hqqplus.modules import PackedEmbedding, PackedLinear
from hqqplus.quantization import QuantSpec

WIDTH, LENGTH = 64, 8
SETTINGS = [{}, {"metadata_bits": 16, "nbits": 1}, {"axis": 0, "group_size": 64, "nbits": 4}, {"nbits": 3}]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_model(folder: Path, *adapters: dict[str, Any]) -> Any:
    """A small model packed to 2 bits, with these adapters, all of them active."""
    torch.manual_seed(0)
    config = HqqPlusConfig(nbits=2, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    plain = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    for number, settings in enumerate(adapters):
        config = LoraConfig(**{**plain, **settings})
        if number == 0:
            model = get_peft_model(model, config, adapter_name="0")
        else:
            model.add_adapter(str(number), config)
    if len(adapters) > 1:
        model.base_model.set_adapter([str(number) for number in range(len(adapters))])
    return model


def decoder_layer(model: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The first decoder layer, and what it takes beside the hidden states."""
    inner = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    positions = inner.rotary_emb(torch.zeros(1, LENGTH, WIDTH), torch.arange(LENGTH)[None])
    return inner.layers[0], {"position_embeddings": positions}


def step(function: Callable[..., Any], module: nn.Module, x: Tensor, **arguments: Any) -> list[Tensor]:
    """[y, gradients of x and of the trained parameters of `module`]."""
    x = x.detach().requires_grad_()
    y = function(x, **arguments)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return [y, *torch.autograd.grad(y, wanted, dy)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_packed_layers_alone(settings: dict[str, Any]) -> None:
    spec = QuantSpec(**{"nbits": 2, "group_size": 32, **settings})
    torch.manual_seed(0)
    linear = PackedLinear.from_linear(nn.Linear(WIDTH, 48), spec)
    x = torch.randn(3, WIDTH)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, linear, x), step(linear, linear, x), rtol=0, atol=0)
    explained = torch._dynamo.explain(linear)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    if spec.axis == 1:
        table = PackedEmbedding.from_embedding(nn.Embedding(20, WIDTH), spec)
        compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(torch.arange(5)), table(torch.arange(5)))


@pytest.mark.parametrize(
    ("adapters", "autocast"),
    [
        ([], False),
        ([{}], False),
        ([{}], True),
        ([{"use_rslora": True}, {"r": 2}], False),
        pytest.param([{"use_rslora": True}, {"r": 2}], True, marks=pytest.mark.slow),
        pytest.param(
            [{"use_dora": True}], True, marks=pytest.mark.slow
        ),  # PEFT's own forward pass over the packed layer
    ],
    ids=str,
)
def test_a_decoder_layer_is_one_graph(
    random_model: Callable[..., Path], adapters: list[dict[str, Any]], autocast: bool
) -> None:
    model = make_model(random_model("llama"), *adapters).train()
    layer, arguments = decoder_layer(model)
    x = torch.randn(2, LENGTH, WIDTH)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", enabled=autocast):
        found = step(compiled, layer, x, **arguments)
        torch.testing.assert_close(found, step(layer, layer, x, **arguments), rtol=0, atol=0)
        with torch.no_grad():
            assert torch.equal(compiled(x, **arguments), layer(x, **arguments))


def test_dropout_in_a_compiled_layer(random_model: Callable[..., Path]) -> None:
    model = make_model(random_model("llama"), {"lora_dropout": 0.3}).train()
    layer, arguments = decoder_layer(model)
    x = torch.randn(2, LENGTH, WIDTH)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = step(layer, layer, x, **arguments)
    torch.manual_seed(1)
    torch.testing.assert_close(step(compiled, layer, x, **arguments), expected, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_layer_under_gradient_checkpointing(random_model: Callable[..., Path], use_reentrant: bool) -> None:
    model = make_model(random_model("llama"), {}).train()
    layer, arguments = decoder_layer(model)
    x = torch.randn(2, LENGTH, WIDTH)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def checkpointed(x: Tensor) -> Tensor:
        function = lambda x: compiled(x, **arguments)  # noqa: E731
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=use_reentrant)

    expected = step(layer, layer, x, **arguments)
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = checkpointed(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)))
    found = [y, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_checkpointing_inside_the_graph(random_model: Callable[..., Path]) -> None:
    model = make_model(random_model("llama"), {}).train()
    layer, arguments = decoder_layer(model)
    x = torch.randn(2, LENGTH, WIDTH)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda x: layer(x, **arguments), x, use_reentrant=False)

    expected = step(layer, layer, x, **arguments)
    torch.testing.assert_close(step(checkpointed, layer, x), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_a_whole_model_is_one_graph(random_model: Callable[..., Path]) -> None:
    model = make_model(random_model("llama"), {}).train()
    ids = torch.arange(3, 3 + LENGTH).view(1, -1)
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    expected = model.get_base_model()(input_ids=ids, labels=ids, use_cache=False).loss
    found = compiled(input_ids=ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(found, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained))


def test_another_number_of_rows_needs_no_third_graph(random_model: Callable[..., Path]) -> None:
    model = make_model(random_model("llama"), {})
    lora = next(m for m in model.modules() if isinstance(m, PackedLoraLinear))
    assert "MatmulLora" in type(lora(torch.randn(3, WIDTH)).grad_fn).__name__
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lora, fullgraph=True, backend=count)
    for rows in (3, 5, 9, 17):
        x = torch.randn(rows, WIDTH)
        torch.testing.assert_close(compiled(x), lora(x))
    assert len(graphs) == 2  # the first size, and any size


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor needs a C++ compiler")
def test_the_inductor_compiles_a_decoder_layer(random_model: Callable[..., Path]) -> None:
    model = make_model(random_model("llama"), {}).train()
    layer, arguments = decoder_layer(model)
    x = torch.randn(2, LENGTH, WIDTH)
    compiled = torch.compile(layer, fullgraph=True)
    found, expected = step(compiled, layer, x, **arguments), step(layer, layer, x, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def cuda_layer(dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> PackedLoraLinear:
    """A packed layer with a float32 adapter, on the device."""
    torch.manual_seed(0)
    linear = nn.Linear(512, 384, bias).to(dtype)
    model = nn.Sequential(PackedLinear.from_linear(linear, QuantSpec(2, 64)))
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    layer = get_peft_model(model, config).base_model.model[0]
    assert isinstance(layer, PackedLoraLinear)
    return layer.cuda()


def assert_equal_but_for_rounding(found: list[Tensor], expected: list[Tensor]) -> None:
    """To a rounding of bfloat16, in the norm: cuBLAS may take another kernel within a graph. NaN is not equal."""
    for one, other in zip(found, expected, strict=True):
        assert (one.detach() - other.detach()).float().norm() <= 1e-2 * other.detach().float().norm()


def warmed_up(function: Callable[[], Any]) -> None:
    """Run `function` a few times on a stream of its own, as a capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64, 2048])
def test_inference_in_a_cuda_graph(rows: int) -> None:
    layer = cuda_layer().eval()
    x = torch.randn(rows, 512, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        warmed_up(lambda: layer(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            x.normal_()
            y.fill_(torch.nan)
            graph.replay()
            assert_equal_but_for_rounding([y], [layer(x)])


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [64, 2048])
def test_a_training_step_in_a_cuda_graph(rows: int, autocast: bool) -> None:
    layer = cuda_layer().train()
    trained = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(rows, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    dy = torch.randn(rows, 384, dtype=torch.bfloat16, device="cuda")

    def training_step() -> list[Tensor]:
        # A cast that autocast remembers would be captured once and never again.
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
            y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *trained], dy)]

    warmed_up(training_step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step()
    for _ in range(3):
        with torch.no_grad():
            for tensor in (x, dy, *trained):
                tensor.normal_()
            for tensor in captured:
                tensor.detach().fill_(torch.nan)
        graph.replay()
        assert_equal_but_for_rounding(captured, training_step())


@pytest.mark.gpu
def test_make_graphed_callables() -> None:
    layer, twin = cuda_layer().train(), cuda_layer().train()
    sample = torch.randn(256, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(layer, (sample,), allow_unused_input=True)
    for _ in range(3):
        x = torch.randn_like(sample).requires_grad_()
        other = x.detach().requires_grad_()
        dy = torch.randn(256, 384, dtype=torch.bfloat16, device="cuda")
        y, expected = graphed(x), twin(other)
        y.backward(dy)
        expected.backward(dy)
        assert_equal_but_for_rounding([y, x.grad], [expected, other.grad])
    gradients = [[p.grad for p in m.parameters() if p.requires_grad] for m in (layer, twin)]
    assert_equal_but_for_rounding(*gradients)


@pytest.mark.gpu
def test_a_compiled_training_step_on_a_device() -> None:
    layer = cuda_layer().train()
    x = torch.randn(64, 512, dtype=torch.bfloat16, device="cuda")
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        found = [t.clone() for t in step(compiled, layer, x)]
        assert_equal_but_for_rounding(found, step(layer, layer, x))
