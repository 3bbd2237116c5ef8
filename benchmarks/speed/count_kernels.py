"""Count of the kernels and bytes of one decoder layer, from torch.compile's graphs, without a GPU.

    python benchmarks/speed/count_kernels.py [--shape llama3-8b] [--tokens 16384] [--json FILE]
    python benchmarks/speed/count_kernels.py --device h100
    # Count the kernels of another version of the package:
    PYTHONPATH=OTHER_CHECKOUT/src python benchmarks/speed/count_kernels.py ...

One layer of the real shape is compiled with fake tensors in the same way as in training: Dynamo,
the joint graph, its partition into forward and backward, Inductor's passes, and its fusion by the
rules of Triton. To count the kernels in our custom operators, their functions run on fake tensors.

The bytes of a kernel are those of its inputs and outputs, each counted once, as with a perfect
cache. Operations are counted only for matmuls, not for attention. The time is a forecast for a
device of gpu_rates.py: the time of a kernel is the maximum of the times of its operations and its
bytes, and at least LAUNCH.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from gpu_rates import MACHINES, RATES, Rates
from kernel_terms import (
    ATTENTION,
    GROUPED,
    OTHER,
    PRODUCT_OPERATORS,
    PRODUCTS,
    SKINNY,
    TERMS,
    is_skinny,
    product_dimensions,
)
from torch import Tensor
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor
from torch._inductor import ir
from torch._inductor.compile_fx import (
    _recursive_post_grad_passes,
    _recursive_record_original_output_strides,
    compile_fx,
    fake_tensor_prop,
)
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.lowering import lowerings, pointwise_cat
from torch._inductor.virtualized import V
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoConfig

from tunesmith.build_model import define_model
from tunesmith.config.schema import Adapter, Data, Model, Run, Source
from tunesmith.formats import matmul, mxfp4
from tunesmith.formats.scaled_matmul import ROW_WISE
from tunesmith.host.chips import CHIPS
from tunesmith.model.arch.load import materialize
from tunesmith.model.arch.shapes import find_shape
from tunesmith.model.known.model_types import TUNED_SUPPORT
from tunesmith.model.layers import attention
from tunesmith.model.layers.documents import Documents
from tunesmith.model.weights.shipped import AS_SHIPPED, shipped_form
from tunesmith.optim.weight_gradients import accumulate_in_fp32
from tunesmith.quant import expert_matmul, expert_rows, grouped_experts
from tunesmith.quant.expert_rows import RowIndex
from tunesmith.quant.replace import convert_to_eight_bit
from tunesmith.runtime.compilation import compile_layers
from tunesmith.runtime.recompute import recompute_layers

LAUNCH = 2.5e-6  # minimum seconds for which a kernel occupies the GPU
# Operators that launch no kernel. They allocate memory or return a view of a tensor.
NO_KERNEL = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "detach",
    "_unsafe_view",
    "lift_fresh",
)
GATHERS = ("index", "index_select")
# Operators that replace FlashAttention, which has no CPU kernel, and the numbers of its kernels.
# The backward has three kernels: row sums of dO * O, gradients, and conversion of dq.
ATTENTION_KERNELS = {"count::attention": 1, "count::attention_backward": 3}


def cat_of_cuda(parts: Sequence[ir.TensorBox], dim: int = 0) -> ir.TensorBox:
    """Lower `cat` as Inductor does for a GPU. Inductor's own function would lower it for a CPU.

    On a GPU, `cat` is fused into the kernels that use its result. But if a part reads a reduction,
    the kernels that compute the parts write them to the result.
    """
    dim %= len(parts[0].get_size())
    for part in parts:
        for name in part.get_read_names():
            if isinstance(getattr(V.graph.get_buffer(name), "data", None), ir.Reduction):
                return ir.TensorBox(ir.ConcatKernel.create(parts, dim))
    return pointwise_cat(parts, dim)


# Let Inductor fuse kernels by Triton's rules, as for a GPU.
INDUCTOR = inductor.patch(cpu_backend="triton")


@torch.library.custom_op("count::attention", mutates_args=())
def counted_attention(q: Tensor, k: Tensor, v: Tensor, edges: Tensor) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("count::attention_backward", mutates_args=())
def counted_attention_backward(
    d: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, edges: Tensor
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (q, k, v)]


counted_attention.register_fake(lambda q, k, v, edges: torch.empty_like(q))
counted_attention_backward.register_fake(
    lambda d, q, k, v, out, edges: [torch.empty_like(t) for t in (q, k, v)]
)
counted_attention.register_autograd(
    lambda ctx, d: (*counted_attention_backward(d, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3], output, inputs[3]),
)


@torch.library.custom_op("count::mxfp4", mutates_args=())
def counted_mxfp4(blocks: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    return blocks.new_empty(len(blocks), exponents.shape[-1] * 32, dtype=dtype)


counted_mxfp4.register_fake(
    lambda blocks, exponents, dtype: blocks.new_empty(
        len(blocks), exponents.shape[-1] * 32, dtype=dtype
    )
)


def attention_of_cuda(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, *_: Any, **__: Any) -> Tensor:
    """Replace torch's `varlen_attn` by the counted operator."""
    out: Tensor = counted_attention(q, k, v, edges)
    return out


class Launch(NamedTuple):
    """A kernel, or all kernels of attention in one direction.

    Attributes:
        term: a term of kernel_terms.py.
        size: bytes read and written.
        operations: operations of a matmul, else 0.
        eight_bit: whether it is an 8-bit matmul.
        kernels: number of kernels.
    """

    term: str
    size: int
    operations: int = 0
    eight_bit: bool = False
    kernels: int = 1

    def seconds(self, rates: Rates) -> float:
        """Compute the forecast time. Return 0 for attention, whose time does not follow its bytes.

        The result is the maximum of the times of its operations, its bytes, and LAUNCH.
        """
        if self.term == ATTENTION:
            return 0.0
        product = rates.eight_bit_product if self.eight_bit else rates.product
        bandwidth = rates.skinny_bandwidth if self.term == SKINNY else rates.memory_bandwidth
        return max(self.operations / product, self.size / bandwidth, LAUNCH)


@dataclass
class Term:
    """A part of the time of a layer or step, with the operations of its matmuls and the GiB that
    its kernels read and write.
    """

    ms: float = 0.0
    tera_operations: float = 0.0
    gib: float = 0.0

    def add(self, other: Term, times: float = 1.0) -> None:
        self.ms += times * other.ms
        self.tera_operations += times * other.tera_operations
        self.gib += times * other.gib


@dataclass
class Count:
    """The kernels of one layer in one direction. `tera_operations` only counts matmuls."""

    launches: list[Launch] = field(default_factory=list)

    @property
    def kernels(self) -> int:
        return sum(launch.kernels for launch in self.launches)

    @property
    def products(self) -> int:
        return sum(launch.operations > 0 for launch in self.launches)

    @property
    def gib(self) -> float:
        return sum(launch.size for launch in self.launches) / 2**30

    @property
    def tera_operations(self) -> float:
        return sum(launch.operations for launch in self.launches) / 1e12

    def ms(self, rates: Rates) -> float:
        """Compute the forecast milliseconds without attention."""
        return 1e3 * sum(launch.seconds(rates) for launch in self.launches)

    def terms(self, rates: Rates) -> dict[str, Term]:
        """Return the sums by term. The term of attention has no time."""
        terms = {name: Term() for name in TERMS}
        for launch in self.launches:
            ms = 1e3 * launch.seconds(rates)
            term = Term(ms, launch.operations / 1e12, launch.size / 2**30)
            terms[launch.term].add(term)
        return terms

    def add(self, size: int) -> None:
        """Add one kernel that is not a matmul and reads and writes `size` bytes."""
        self.launches.append(Launch(OTHER, size))

    def add_product(
        self,
        size: int,
        operations: int,
        dimensions: Sequence[int],
        *,
        eight_bit: bool = False,
    ) -> None:
        """Add one matmul with dimensions (m, k, n)."""
        term = SKINNY if is_skinny(dimensions) else PRODUCTS
        self.launches.append(Launch(term, size, operations, eight_bit))

    def as_json(self, rates: Rates) -> dict[str, Any]:
        names = ("kernels", "products", "gib", "tera_operations")
        totals = {name: getattr(self, name) for name in names}
        terms = {name: vars(term) for name, term in self.terms(rates).items()}
        return {**totals, "ms": self.ms(rates), "terms": terms}


def bytes_of(*values: Any) -> int:
    return sum(int(t.numel()) * t.itemsize for t in tensors_of(*values))


def tensors_of(*values: Any) -> list[Tensor]:
    return [t for t in tree_flatten(values)[0] if isinstance(t, Tensor)]


def product_operations(name: str, tensors: list[Tensor]) -> int:
    """Return the operations 2 m n k of a matmul. Return 0 for other operators.

    Args:
        name: the name of the operator.
        tensors: the operator's input tensors. The summand is the first.
    """
    if name not in PRODUCT_OPERATORS:
        return 0
    a, b = tensors[1:3] if name.startswith("addmm") else tensors[:2]
    # A grouped matmul multiplies each row by one expert's matrix, or splits n in [m, n] x [n, k].
    if name == GROUPED:
        return 2 * int(a.numel()) * int(b.shape[-1])
    return 2 * int(a.numel()) * (int(b.numel()) // int(a.shape[-1]))


class Launches(TorchDispatchMode):
    """Dispatch mode that counts the kernels of the operators that are called in it.

    Args:
        count: the count to which kernels are added.
        in_turns: whether experts are multiplied one after the other. The rows of an expert are then
            read from memory once, when they are gathered or first written, and afterwards from the
            cache. Therefore skinny products read and write no memory. The cache of a GB10 (24 MB)
            holds 1,024 rows of Qwen3-30B-A3B together with the expert.
    """

    def __init__(self, count: Count, *, in_turns: bool = False) -> None:
        super().__init__()
        self.count = count
        self.in_turns = in_turns

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        view = any(
            a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments
        )
        if not view and space != "prim" and name not in NO_KERNEL:
            tensors = tensors_of(args, kwargs)
            size, operations = bytes_of(tensors, out), product_operations(name, tensors)
            if name == "new_zeros":
                size = bytes_of(out)
            if name in GATHERS:  # reads only the rows that it returns
                size = 2 * bytes_of(out)
            if operations:
                dimensions = product_dimensions(name, [tensor.shape for tensor in tensors])
                eight_bit = tensors[0].itemsize == 1
                if self.in_turns:
                    weight = tensors[2] if name.startswith("addmm") else tensors[1]
                    size = 0 if is_skinny(dimensions) else bytes_of(weight, out)
                self.count.add_product(size, operations, dimensions, eight_bit=eight_bit)
            elif self.in_turns and name in GATHERS:
                self.count.add(bytes_of(out))
            else:
                self.count.add(size)
        return out


class Counter:
    """Backend of torch.compile that counts Inductor's kernels and returns the uncompiled graph."""

    def __init__(self, *, in_turns: bool = False) -> None:
        self.counts: dict[str, Count] = {}
        self.in_turns = in_turns

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_fx(module, inputs, inner_compile=self.inner)

    def inner(
        self, module: torch.fx.GraphModule, inputs: Any, *, is_backward: bool = False, **_: Any
    ) -> Any:
        count = self.counts.setdefault("backward" if is_backward else "forward", Count())
        mode = detect_fake_mode(inputs)
        with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            fake_tensor_prop(module, inputs)
            _recursive_record_original_output_strides(module)
            _recursive_post_grad_passes(module, is_inference=False)
            fake_tensor_prop(module, inputs)
            for node in module.graph.nodes:
                count_operator(node, count, mode, in_turns=self.in_turns)
            graph = GraphLowering(module, inputs, shape_env=mode.shape_env, is_backward=is_backward)
            with V.set_graph_handler(graph):
                graph.run(*inputs)
                graph._update_scheduler()
                for fused in graph.scheduler.nodes:
                    # `count_operator` counts library kernels, which are the first two types. A
                    # NopKernel is a `cat` whose parts are counted.
                    if not isinstance(fused.node, ir.ExternKernel | ir.MultiOutput | ir.NopKernel):
                        count.add(int(fused.get_read_write_buffers_sizes()))
        return make_boxed_func(module.forward)


def count_operator(
    node: torch.fx.Node, count: Count, mode: FakeTensorMode, *, in_turns: bool
) -> None:
    """Count the kernels of a node that Inductor does not generate: library matmuls, attention, and
    our custom operators.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    if schema.name in ATTENTION_KERNELS:
        size = bytes_of(args, node.meta["val"])
        count.launches.append(Launch(ATTENTION, size, kernels=ATTENTION_KERNELS[schema.name]))
        return
    # On a GPU this is one matmul, which also reads the gradient to which it adds its result.
    if schema.name == "tunesmith::add_weight_gradient":
        gradient, _, dy, x = args
        operations = 2 * gradient.numel() * len(dy)
        size = bytes_of(gradient, gradient, dy, x)
        count.add_product(size, operations, (*gradient.shape, len(dy)))
        return
    space, name = schema.name.split("::")
    run: Callable[..., Any] = node.target  # type: ignore[assignment]
    if space == "tunesmith":
        run = OPDEFS[schema.name]._init_fn
    elif name not in PRODUCT_OPERATORS:
        return
    in_turns = in_turns and schema.name.startswith("tunesmith::expert_products")
    with mode, Launches(count, in_turns=in_turns), torch.no_grad():
        run(*args, **kwargs)


def recipe(base: str, *, full: bool, target: str | tuple[str, ...] = "all-linear") -> Run:
    """Return a recipe with the values that `define_model` reads.

    Args:
        base: "bf16", or a value of `model.quantize`.
        full: whether all weights are trained.
        target: the value of `adapter.target`.
    """
    return Run(
        model=Model(name="shape", dtype="bf16", quantize="none" if base == "bf16" else base),
        data=Data(train=(Source(source="rows.jsonl"),)),
        adapter=Adapter(kind="none" if full else "lora", target=target),
        output_dir="out",
    )


@contextmanager
def experts_of_cuda(*, by_expert: bool) -> Iterator[None]:
    """Compute matmuls of experts in this context as on a GPU.

    All experts have the same number of rows. One compiled kernel dequantizes MXFP4, and one kernel,
    which reads and writes the rows, adds the LoRA update.

    Args:
        by_expert: whether experts are multiplied one after the other. Otherwise one kernel
            multiplies all experts.
    """

    def even_ends(index: RowIndex) -> list[int]:
        count, experts = len(index.tokens), len(index.offsets)
        return [count * (expert + 1) // experts for expert in range(experts)]

    with (
        patch.object(expert_rows, "uses_grouped_mm", lambda *_: not by_expert),
        patch.object(RowIndex, "ends_on_host", even_ends),
        patch.object(expert_matmul, "is_cpu", lambda _: False),
        patch.object(grouped_experts, "add_low", lambda y, *_: y.neg_()),
        patch.object(mxfp4, "compiled_mxfp4", lambda: counted_mxfp4),
    ):
        yield


def count_layer(
    shape: str, run: Run, *, tokens: int, recomputed: bool, by_expert: bool = False
) -> dict[str, Count]:
    """Count the kernels of one layer of `shape`, forward and backward.

    Args:
        tokens: tokens of the micro batch.
        recomputed: whether the backward recomputes the layer.
        by_expert: whether experts are multiplied one after the other, as on devices for which torch
            has no grouped matmul.
    """
    values = find_shape(shape).config
    form = shipped_form(values, shape) if run.model.quantize == AS_SHIPPED else None
    config = AutoConfig.for_model(**{**values, "num_hidden_layers": 1})
    torch.compiler.reset()
    counter, fake = Counter(in_turns=by_expert), FakeTensorMode(allow_non_fake_inputs=True)
    model = define_model(
        run,
        SimpleNamespace(
            config=config,
            model=run.model,
            vocab_rows=config.vocab_size,
            support=TUNED_SUPPORT,
            form=form,
            full_config=None,
        ),
    )  # type: ignore[arg-type]
    if run.adapter.kind == "none":  # as in full fine-tuning on one GPU
        accumulate_in_fp32(model.model.layers)
    # Compute dB as on a GPU. On a CPU, dB is computed in transposed order and then copied.
    b_of_cuda = patch.object(matmul, "gradient_of_b", lambda dy, xa: dy.T @ xa, create=True)
    kernel = patch.multiple(attention, varlen_attn=attention_of_cuda, fits_varlen=lambda *_: True)
    cat = patch.dict(lowerings, {torch.ops.aten.cat.default: cat_of_cuda})
    with fake, kernel, b_of_cuda, experts_of_cuda(by_expert=by_expert), INDUCTOR, cat:
        materialize(model, torch.device("cpu"))
        for name, p in model.named_parameters():  # were created outside the fake mode
            module, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            setattr(
                module, key, torch.nn.Parameter(fake.from_tensor(p), requires_grad=p.requires_grad)
            )
        if run.model.quantize == "fp8":
            convert_to_eight_bit(model, ROW_WISE)
        model.train().set_attn_implementation(attention.register())
        layers = model.model.layers
        recompute_layers(layers, len(layers) * recomputed)
        compile_layers(layers, varied=False, backend=counter)
        hidden = torch.empty(
            1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True
        )
        with torch.no_grad():
            positions = torch.arange(tokens).unsqueeze(0)
            rotary = model.model.rotary_emb(hidden, positions)
        edges = torch.empty(81, dtype=torch.int32)
        out = layers[0](
            hidden, position_embeddings=rotary, documents=Documents(edges, 2048, "varlen")
        )
        out.backward(torch.empty_like(out))
    return counter.counts


def main() -> None:
    """Print a table with a row for each base and direction, with and without recomputation."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--shape", default="llama3-8b")
    p.add_argument("--tokens", type=int, default=16384)
    p.add_argument("--bases", nargs="+", default=["bf16", "fp8", "nf4"])
    p.add_argument(
        "--full", action="store_true", help="full fine-tuning: train all weights without adapter"
    )
    p.add_argument("--target", nargs="+", default="all-linear", help="value of adapter.target")
    p.add_argument(
        "--device",
        choices=RATES,
        default="h200",
        help="device whose rates give the times, and whose kernels multiply experts",
    )
    p.add_argument("--json")
    a = p.parse_args()
    target = a.target if isinstance(a.target, str) else tuple(a.target)
    by_expert = not CHIPS[MACHINES[a.device]].grouped_mm
    counts_by_row: dict[str, Any] = {}
    rates = RATES[a.device]
    print(
        f"{'a layer of ' + a.shape:32} {'kernels':>8} {'products':>8} {'GiB':>8} "
        f"{'TFLOP':>8} {'ms':>8}"
    )
    for base in a.bases:
        for recomputed in (False, True):
            run = recipe(base, full=a.full, target=target)
            counts = count_layer(
                a.shape, run, tokens=a.tokens, recomputed=recomputed, by_expert=by_expert
            )
            for direction, c in counts.items():
                row = f"{base}{', recomputed' * recomputed}, {direction}"
                counts_by_row[row] = c.as_json(rates)
                shown = f"{row:32} {c.kernels:8} {c.products:8} {c.gib:8.2f}"
                print(f"{shown} {c.tera_operations:8.2f} {c.ms(rates):8.2f}", flush=True)
    if a.json:
        with open(a.json, "w") as file:
            setting = {"shape": a.shape, "tokens": a.tokens, "device": a.device}
            report = {**setting, "counts": counts_by_row}
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
