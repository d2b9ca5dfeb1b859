"""How much a loss minds what is done to parameters, outputs and linear layers of a model.

Four measures of curvature, each without the Hessian itself: the diagonal of the empirical Fisher
matrix of parameters, the same for the outputs of modules, the trace of a Hessian, and the Hessian
of a linear layer's squared error.

All of them take the model as it is used, in evaluation mode and without its random parts, and leave
it as they found it: flags, gradients, hooks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

Loss = Callable[[Any, Any], Tensor]
"""loss(model, batch): the loss of a batch of one sample, a scalar. A batch is a tensor, or tensors
in tuples, lists and mappings (which become dicts), whose first axis counts samples; what else
stands there is passed on."""


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    parameters: Iterable[str] | None = None,
    chunk: int = 16,
) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher matrix: mean over samples of the squared gradient.

        F_i = 1/n sum_s (d loss_s / d theta_i)^2

    The gradients are those of single samples, also where samples come in batches: the square of a
    batch's mean gradient is another, smaller number. At a minimum F approximates the Hessian's
    diagonal when the loss is a log-likelihood and the labels are drawn from the model; with the
    labels of the data it is "empirical".

    Samples run side by side through `torch.func.vmap`. Where the model or the loss does not allow
    that (control flow that looks at values, operators without a batching rule), they run one by
    one.

    Args:
        model: any module; of its parameters none needs `requires_grad`.
        batches: what `loss` takes, n samples in all; gone through once.
        loss: see `Loss`.
        parameters: names as in `model.named_parameters()`; None is all of floating type.
        chunk: samples whose gradients are held at the same time.

    Returns:
        For each name the mean squared gradient, of the parameter's shape; fp32, fp64 for fp64.

    Raises:
        ValueError: an unknown name, no parameter or no sample, batches whose tensors differ in
            their number of samples, a loss that is no scalar or not differentiable.
        TypeError: a value of another type.

    Source: arXiv 1905.12558 (Kunstner, Balles, Hennig: the empirical Fisher and its limits).
    Oracle: one backward pass for each sample; the Gauss-Newton matrix of a softmax.
    """
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, expected 1 or more")
    chosen = _parameters(model, parameters)
    wrapped = _Wrapped(model, loss)
    gradients = _side_by_side
    samples = 0
    with _in_use(model):
        totals = {
            name: torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            for name, x in chosen.items()
        }
        for batch in _batches(batches):
            for part in batch.split(chunk):
                try:
                    found = gradients(wrapped, chosen, part)
                except Exception:
                    # What is really wrong shows again without vmap.
                    if gradients is _one_by_one:
                        raise
                    gradients = _one_by_one
                    found = gradients(wrapped, chosen, part)
                for name, gradient in found.items():
                    totals[name] += gradient.to(totals[name].dtype).square().sum(0)
                samples += part.samples
    return {name: total / samples for name, total in totals.items()}


def output_fisher(
    model: nn.Module, modules: Iterable[str], batches: Iterable[Any], loss: Loss
) -> dict[str, float]:
    """How much the loss minds a change of a module's output: mean squared gradient of a token.

        F = 1/n sum_t |d loss / d y_t|^2

    over the n tokens t of all samples, y_t being what the module gives for a token, and the loss
    that of the token's sample. Where the Fisher matrix stands for the Hessian, F is the mean trace
    of a token's block: a change dy of one token's d features, in a random direction, raises the
    loss by F |dy|^2 / (2 d).

    Args:
        model: any module; of its parameters none needs `requires_grad`.
        modules: names as in `model.named_modules()`. A module gives a tensor [..., d], or a tuple
            or list that begins with one; all axes but the last count tokens. It may run several
            times a sample.
        batches: what `loss` takes; gone through once, one sample at a time.
        loss: see `Loss`.

    Returns:
        F for each name.

    Raises:
        ValueError: an unknown name, a module that never ran, no sample, batches whose tensors
            differ in their number of samples, a loss that is no scalar or not differentiable.
        TypeError: a module that gives something else; a value of another type.

    Source: arXiv 2408.10284 (AdapMoE), the sensitivity of a layer. Oracle: the Hessian by
    `torch.func`, for labels drawn from the model.
    """
    chosen = _modules(model, modules)
    wrapped = _Wrapped(model, loss)
    frozen = {f"model.{name}": x.detach() for name, x in model.named_parameters()}
    probes: list[tuple[str, Tensor]] = []
    totals, tokens = dict.fromkeys(chosen, 0.0), dict.fromkeys(chosen, 0)

    def watch(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            several = isinstance(output, (tuple, list)) and len(output) > 0
            first = output[0] if several else output
            if not isinstance(first, Tensor) or not first.is_floating_point() or not first.ndim:
                raise TypeError(f"modules: {name!r} gives {_told(first)}, expected floats [..., d]")
            # The gradient of what is added is that of the output, whoever overwrites the sum later.
            probe = torch.zeros_like(first, requires_grad=True)
            probes.append((name, probe))
            return _like(output, (first + probe, *output[1:])) if several else first + probe

        return hook

    with _in_use(model), ExitStack() as stack:
        for name, module in chosen.items():
            stack.callback(module.register_forward_hook(watch(name)).remove)
        for batch in _batches(batches):
            for sample in batch.split(1):
                probes.clear()
                value = torch.func.functional_call(wrapped, frozen, (sample.rebuild(),))
                if not probes:
                    continue
                gradients = _grad(value, [probe for _, probe in probes])
                for (name, probe), gradient in zip(probes, gradients, strict=True):
                    totals[name] += gradient.double().square().sum().item()
                    tokens[name] += probe.numel() // max(1, probe.shape[-1])
    _refuse_idle(tokens)
    return {name: totals[name] / tokens[name] for name in chosen}


class Trace(NamedTuple):
    """An estimate of a trace."""

    value: float
    standard_error: float
    """Of `value`, from the spread of the samples."""


def hutchinson_trace(
    loss: Tensor, parameters: Iterable[Tensor], *, samples: int, seed: int
) -> Trace:
    """The trace of the Hessian of a loss, estimated with random signs.

        E[v H v] = tr H,  Var[v H v] = 2 sum_{i != j} H_ij^2  for v_i = +1 or -1

    so that a diagonal Hessian is found exactly by a single sample. Each costs a backward pass
    through the graph of the gradient, which is twice differentiated.

    Args:
        loss: a scalar with its graph, which is kept.
        parameters: tensors that the loss was computed from; a block of them gives the trace of its
            block of the Hessian.
        samples: number of random vectors, 2 or more.
        seed: of the signs, which are the same on every device.

    Returns:
        Trace(value, standard_error).

    Raises:
        ValueError: a loss that is no scalar or has no graph, no parameter or one that needs no
            gradient, fewer than 2 samples.
        TypeError: a value of another type.

    Source: Hutchinson, Communications in Statistics 19 (1990); its use for layers is that of arXiv
    1911.03852 (HAWQ-V2). Oracle: the Hessian by `torch.func`, and the variance above.
    """
    if isinstance(parameters, Tensor):
        # Its rows would be other tensors than the loss was computed from.
        raise TypeError("parameters: got a tensor, expected a sequence of them")
    chosen = list(parameters)
    if not chosen:
        raise ValueError("parameters: got none, expected one at least")
    for at, x in enumerate(chosen):
        if not isinstance(x, Tensor):
            raise TypeError(f"parameters[{at}]: got {type(x).__name__}, expected a tensor")
        if not x.requires_grad:
            raise ValueError(f"parameters[{at}]: got a tensor that needs no gradient")
    if samples < 2:
        raise ValueError(f"samples: got {samples}, expected 2 or more")
    with torch.inference_mode(False), torch.enable_grad():
        gradients = _grad(loss, chosen, create_graph=True)
        # A gradient without a graph is constant: its rows of the Hessian are 0.
        rows = [at for at, gradient in enumerate(gradients) if gradient.requires_grad]
        generator = torch.Generator().manual_seed(seed)
        found = torch.zeros(samples, dtype=torch.float64)
        for sample in range(samples):
            signs = [_signs(x, generator) for x in chosen]
            products = (
                torch.autograd.grad(
                    [gradients[at] for at in rows],
                    [chosen[at] for at in rows],
                    [signs[at] for at in rows],
                    retain_graph=True,
                    allow_unused=True,
                )
                if rows
                else ()
            )
            for at, product in zip(rows, products, strict=True):
                if product is not None:
                    found[sample] += (product.double() * signs[at].double()).sum().cpu()
    return Trace(found.mean().item(), found.std().item() / math.sqrt(samples))


class LayerHessian:
    """Adds up the inputs of a linear layer to the Hessian of its squared error.

        H = 2/n sum_r x_r x_r^T

    is the Hessian of 1/n |W x_r - W' x_r|^2, summed over r, for every row of W'. It takes the
    memory of H, twice, however many inputs there are.

    Args:
        width: features d of an input.
        dtype: in which to add, fp32 or fp64.
        device: of the sum.

    Source: arXiv 2210.17323 (GPTQ), section 3. Oracle: the Hessian by `torch.func`.
    """

    def __init__(
        self,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if width < 1:
            raise ValueError(f"width: got {width}, expected 1 or more")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: got {dtype}, expected torch.float32 or torch.float64")
        self.width, self.rows = width, 0
        with torch.inference_mode(False):
            self._sum = torch.zeros(width, width, dtype=dtype, device=device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Takes inputs [..., d] of any floating type; all axes but the last count rows."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, expected a tensor")
        if not x.is_floating_point() or not x.ndim or x.shape[-1] != self.width:
            raise ValueError(f"x: got {_told(x)}, expected floats [..., {self.width}]")
        rows = x.reshape(-1, self.width)
        self.rows += len(rows)
        for part in rows.split(max(self.width, 256)):
            part = part.to(self._sum)
            self._sum.addmm_(part.mT, part)

    def hessian(self) -> Tensor:
        """H of all rows so far, [d, d], symmetric to the last bit.

        Raises:
            ValueError: there are none.
        """
        if not self.rows:
            raise ValueError("rows: got none, expected one at least")
        return (self._sum + self._sum.mT) / self.rows


def layer_hessian(
    model: nn.Module,
    modules: Iterable[str],
    batches: Iterable[Any],
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The Hessian of the squared error of linear layers, from the inputs that reach them.

    See `LayerHessian`. Every row counts, also those of padding; where some must not, or where the
    inputs are at hand anyway, use `LayerHessian` itself.

    Args:
        model: any module.
        modules: names of `torch.nn.Linear` layers as in `model.named_modules()`.
        batches: inputs of the model: a mapping becomes keyword arguments, a tuple or list
            positional ones, anything else the only one. Gone through once.
        dtype: in which to add, fp32 or fp64.

    Returns:
        For each name H, [in, in].

    Raises:
        ValueError: an unknown name, a layer that no input reached, another dtype.
        TypeError: a module that is not linear.

    Source: arXiv 2210.17323 (GPTQ), section 3. Oracle: the Hessian by `torch.func`.
    """
    chosen = _modules(model, modules)
    sums = {}
    for name, module in chosen.items():
        if not isinstance(module, nn.Linear):
            got = type(module).__name__
            raise TypeError(f"modules: {name!r} is a {got}, expected a torch.nn.Linear")
        sums[name] = LayerHessian(module.in_features, dtype=dtype, device=module.weight.device)

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            sums[name].add(inputs[0] if inputs else named["input"])

        return hook

    with _in_use(model), torch.no_grad(), ExitStack() as stack:
        for name, module in chosen.items():
            handle = module.register_forward_pre_hook(watch(name), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, (tuple, list)):
                model(*batch)
            else:
                model(batch)
    _refuse_idle({name: one.rows for name, one in sums.items()})
    return {name: one.hessian() for name, one in sums.items()}


class _Wrapped(nn.Module):
    """The loss as a module, so that `functional_call` can put other parameters into the model."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        value = self.loss(self.model, batch)
        if not isinstance(value, Tensor):
            raise TypeError(f"loss: got {type(value).__name__}, expected a tensor")
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"loss: got {_told(value)}, expected a floating scalar for one sample")
        return value.reshape(())


class _Batch(NamedTuple):
    """The tensors of a batch, and how they were put together."""

    tensors: list[Tensor]
    put_together: Callable[[Iterator[Tensor]], Any]

    @property
    def samples(self) -> int:
        return len(self.tensors[0])

    def split(self, size: int) -> Iterator["_Batch"]:
        for at in range(0, self.samples, size):
            yield self._replace(tensors=[x[at : at + size] for x in self.tensors])

    def rebuild(self) -> Any:
        return self.put_together(iter(self.tensors))


def _batches(batches: Iterable[Any]) -> Iterator[_Batch]:
    samples = 0
    for at, data in enumerate(batches):
        tensors: list[Tensor] = []
        batch = _Batch(tensors, _taken_apart(data, tensors))
        if not tensors or any(not x.ndim for x in tensors):
            raise ValueError(f"batches[{at}]: got no tensor with samples, expected [n, ...]")
        sizes = {len(x) for x in tensors}
        if len(sizes) > 1:
            raise ValueError(f"batches[{at}]: got tensors of {sorted(sizes)} samples, expected one")
        samples += batch.samples
        yield batch
    if not samples:
        raise ValueError("batches: got no sample, expected one at least")


def _taken_apart(data: Any, tensors: list[Tensor]) -> Callable[[Iterator[Tensor]], Any]:
    """Appends the tensors of `data`; gives the way to put others in their places."""
    if isinstance(data, Tensor):
        # Tensors made in inference mode cannot be differentiated, copies of them can.
        tensors.append(data.clone() if data.is_inference() else data)
        return next
    if isinstance(data, Mapping):
        named = {name: _taken_apart(x, tensors) for name, x in data.items()}
        return lambda others: {name: part(others) for name, part in named.items()}
    if isinstance(data, (tuple, list)):
        parts = [_taken_apart(x, tensors) for x in data]
        return lambda others: _like(data, (part(others) for part in parts))
    return lambda _: data


def _side_by_side(
    wrapped: _Wrapped, parameters: Mapping[str, Tensor], batch: _Batch
) -> dict[str, Tensor]:
    """Gradients [n, ...] of the samples of a batch."""

    def value(values: dict[str, Tensor], *tensors: Tensor) -> Tensor:
        sample = batch._replace(tensors=[x.unsqueeze(0) for x in tensors]).rebuild()
        return cast(Tensor, torch.func.functional_call(wrapped, _renamed(values), (sample,)))

    values = {name: x.detach() for name, x in parameters.items()}
    axes = (None, *(0 for _ in batch.tensors))
    gradients = torch.func.vmap(torch.func.grad(value), in_dims=axes)
    return cast(dict[str, Tensor], gradients(values, *batch.tensors))


def _one_by_one(
    wrapped: _Wrapped, parameters: Mapping[str, Tensor], batch: _Batch
) -> dict[str, Tensor]:
    """Gradients [n, ...] of the samples of a batch."""
    values = {name: x.detach().requires_grad_() for name, x in parameters.items()}
    found = []
    for sample in batch.split(1):
        value = torch.func.functional_call(wrapped, _renamed(values), (sample.rebuild(),))
        found.append(_grad(value, list(values.values())))
    return {name: torch.stack(x) for name, x in zip(values, zip(*found, strict=True), strict=True)}


def _renamed(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": x for name, x in values.items()}


def _grad(value: Tensor, inputs: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Gradients, 0 for what the value does not depend on."""
    if not isinstance(value, Tensor):
        raise TypeError(f"loss: got {type(value).__name__}, expected a tensor")
    if value.numel() != 1:
        raise ValueError(f"loss: got {_told(value)}, expected a scalar")
    if not value.requires_grad:
        raise ValueError("loss: got a tensor without a graph, expected one to differentiate")
    found = torch.autograd.grad(value, inputs, create_graph=create_graph, allow_unused=True)
    return [
        torch.zeros_like(x) if gradient is None else gradient
        for x, gradient in zip(inputs, found, strict=True)
    ]


def _signs(x: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(x)


@contextmanager
def _in_use(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and gradients; afterwards every module has the flag that it had."""
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def _parameters(model: nn.Module, names: Iterable[str] | None) -> dict[str, Tensor]:
    there = dict(model.named_parameters(remove_duplicate=False))
    if names is None:
        chosen = {name: x for name, x in model.named_parameters() if x.is_floating_point()}
    else:
        chosen = _pick("parameters", names, there)
        for name, x in chosen.items():
            if not x.is_floating_point():
                raise ValueError(f"parameters: {name!r} is {x.dtype}, expected a floating type")
    if not chosen:
        raise ValueError("parameters: got none, expected one at least")
    return dict(chosen)


def _modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    return _pick("modules", names, dict(model.named_modules(remove_duplicate=False)))


def _pick(what: str, names: Iterable[str], there: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(names, str):
        raise TypeError(f"{what}: got a string, expected a sequence of names")
    chosen = {}
    for name in names:
        if name not in there:
            near = get_close_matches(str(name), there, n=3) or list(there)[:3]
            raise ValueError(f"{what}: got {name!r}, expected a name such as {', '.join(near)}")
        chosen[name] = there[name]
    return chosen


def _refuse_idle(counts: Mapping[str, int]) -> None:
    idle = [name for name, count in counts.items() if not count]
    if idle:
        raise ValueError(f"modules: nothing reached {', '.join(idle)}; leave them out")


def _like(data: Any, items: Iterable[Any]) -> Any:
    """The items in a list or tuple of the kind of `data`, with the names that it gives them."""
    return getattr(type(data), "_make", type(data))(items)


def _told(x: object) -> str:
    if isinstance(x, Tensor):
        return f"a {x.dtype} tensor of shape {tuple(x.shape)}"
    return f"a {type(x).__name__}"
