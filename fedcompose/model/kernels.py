"""y = W x + Σ_e g_e s_e B_e A_e x, in the form that is fastest for a decision, a shape and a device.

`RoutedLinear` and `RoutedMLP` stand where a base had its own modules, and choose between the forms:

plain       every expert for every token, weighted in the space of the ranks; any weights, any gradient. The form
            that the others are tested against.
scattered   in use, where few weights are not 0: one product per expert, over the tokens that want it.
sorted      where each token has one expert at weight 1: tokens are put in the order of their experts once for a
            whole gated MLP, so that an expert's tokens are neighbours and its product goes in place into the
            base's. `Loop` multiplies expert by expert; `Grouped` all at once and without asking the device
            anything, for GPUs. In training it is one autograd function, which keeps two activations of an MLP and
            the rank rows, and makes the rest again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedcompose.model.experts import PackedExperts, Update
from fedcompose.model.router import RoutedBlock, RoutingContext, RoutingDecision, Segments

FEW_WEIGHTS = 0.5  # share of weights that are not 0 up to which single products are cheaper than all of them
FEW_TOKENS = 32  # up to so many, a bfloat16 product takes a CPU longer to start than a float32 one to do


class RoutedLinear(nn.Module):
    """A frozen linear with its experts. It follows the decision of its block, or asks as a point of its own.

    It has no `weight`: code that takes a linear's weight to multiply by itself would leave the experts out, and fails.
    """

    def __init__(
        self, linear: nn.Linear, updates: Sequence[Update | None], context: RoutingContext, point: int | None = None
    ) -> None:
        super().__init__()
        self.linear = linear
        self.experts = PackedExperts(updates, linear)
        self.context = context
        self.point = point

    def forward(self, x: Tensor) -> Tensor:
        decision = self.context.decision if self.point is None else self.context.decide(self.point, x)
        return routed_linear(self.linear, self.experts, x, decision)


class RoutedMLP(RoutedBlock):
    """A gated MLP under its own decision: tokens are sorted by expert once, for all three of its linears."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        decision = self.context.decide(self.point, hidden_states)
        y = routed_mlp(self.block, hidden_states, decision)
        if y is None:
            with self.context.decided(decision):
                y = gated_mlp(self.block, hidden_states)
        return y


def routed_linear(linear: nn.Linear, experts: PackedExperts, x: Tensor, decision: RoutingDecision) -> Tensor:
    """One linear and its experts, (..., in) → (..., out)."""
    if decision.choice.shape != x.shape[:-1]:
        raise ValueError(f"a decision about {tuple(decision.choice.shape)} tokens met {tuple(x.shape[:-1])}")
    y: Tensor = linear(x)
    if x.device.type == "cpu" and not learning(x, decision) and few(decision):
        return scattered(y, x, experts, decision.segments)
    return y + plain(experts, x, decision.weights)


def routed_mlp(mlp: Any, x: Tensor, decision: RoutingDecision) -> Tensor | None:
    """A gated MLP of routed linears whose tokens have one expert each; None where another form has to do it."""
    by = sorter(mlp, x, decision) if decision.hard else None
    if by is None:
        return None
    flat = x.reshape(-1, x.shape[-1])
    if learning(x, decision):
        y: Tensor = SortedMLP.apply(  # type: ignore[no-untyped-call]
            flat, decision.weights.flatten(0, -2), mlp, by, decision
        )
    else:
        y = sorted_mlp(flat, mlp, by)
    return y.view(x.shape)


def learning(x: Tensor, decision: RoutingDecision) -> bool:
    """Whether somebody will ask for a gradient."""
    return torch.is_grad_enabled() and (x.requires_grad or decision.learned)


def few(decision: RoutingDecision) -> bool:
    """Whether most weights are 0."""
    if decision.hard:
        return True
    wanted = sum(stop - start for _, start, stop in decision.segments.parts)
    return wanted <= FEW_WEIGHTS * decision.weights.numel()


def plain(experts: PackedExperts, x: Tensor, weights: Tensor) -> Tensor:
    """The weighted updates of x, (..., out)."""
    into, a, b = in_one_format(x.reshape(-1, x.shape[-1]), experts.a, experts.b)
    gates = weights.reshape(-1, weights.shape[-1]).to(into.dtype) @ experts.members.to(into.dtype)
    return ((into @ a.T) * gates @ b).to(x.dtype).view(*x.shape[:-1], b.shape[1])


def in_one_format(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (tokens, in) and an expert's rows, which on a CPU are float32 beside any base, ready to be multiplied."""
    if x.dtype == a.dtype:
        return x, a, b
    if len(x) <= FEW_TOKENS:
        return x.to(a.dtype), a, b
    return x, a.to(x.dtype), b.to(x.dtype)


def add_update_(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y += x a b."""
    x, a, b = in_one_format(x, a, b)
    return y.addmm_(x.mm(a), b) if x.dtype == y.dtype else y.add_(x.mm(a).mm(b))


def scattered(y: Tensor, x: Tensor, experts: PackedExperts, segments: Segments) -> Tensor:
    """Add to y, in place, for every expert the updates of the tokens that want it."""
    to, of = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    for expert, start, stop in segments.parts:
        a, b = experts.each[expert]
        if segments.tokens is None:
            add_update_(to, of, a, b)
            continue
        rows = segments.tokens[start:stop]
        part, a, b = in_one_format(of[rows], a, b)
        ranks = part.mm(a)
        if segments.weights is not None:
            ranks *= segments.weights[start:stop]
        to.index_add_(0, rows, ranks.mm(b).to(y.dtype))
    return y


def gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    """down(act(gate(x)) · up(x)), by the MLP's own modules."""
    y: Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    return y


def sorted_mlp(x: Tensor, mlp: Any, by: Loop | Grouped) -> Tensor:
    """(tokens, hidden) → (tokens, hidden), in use."""

    def project(routed: RoutedLinear, x: Tensor) -> Tensor:
        return by.add_(routed.linear(x), x, routed.experts)

    x = by.sort(x)
    hidden = mlp.act_fn(project(mlp.gate_proj, x)) * project(mlp.up_proj, x)
    return by.unsort(project(mlp.down_proj, hidden))


class SortedMLP(torch.autograd.Function):
    """`sorted_mlp` with the gradients of x and of the decision's weights; everything else is frozen.

    dL/dg_e = Σ over the three linears of ⟨A_e x, s_e B_eᵀ dL/dy⟩: for the chosen expert from what was kept, for all
    experts, where the estimator wants it, from products that only the backward pass makes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, mlp: Any, by: Loop | Grouped, decision: RoutingDecision
    ) -> Tensor:
        def project(routed: RoutedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
            experts = routed.experts
            ranks = by.shrink(x, experts.a, experts)
            return by.expand_(routed.linear(x), ranks, experts.b, experts), ranks

        ordered = by.sort(x)
        gate, gate_ranks = project(mlp.gate_proj, ordered)
        up, up_ranks = project(mlp.up_proj, ordered)
        y, down_ranks = project(mlp.down_proj, mlp.act_fn(gate) * up)
        # Who asks all experts needs the input again; who asks the chosen ones needs to know who they are.
        ctx.selected = decision.selected or not ctx.needs_input_grad[1]
        last = decision.choice.reshape(-1, 1) if ctx.selected else x
        ctx.save_for_backward(gate, up, gate_ranks, up_ranks, down_ranks, last)
        ctx.mlp, ctx.by, ctx.shape = mlp, by, weights.shape
        return by.unsort(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, gate_ranks, up_ranks, down_ranks, last = ctx.saved_tensors
        mlp: Any = ctx.mlp
        by: Loop | Grouped = ctx.by
        asked: list[Tensor] = []

        def back(routed: RoutedLinear, dy: Tensor, ranks: Tensor, x: Tensor | None, dx: Tensor | None = None) -> Tensor:
            """dL/dx of one linear, added to `dx`; `asked` hears what its experts' weights would have changed."""
            experts = routed.experts
            dranks = by.shrink(dy, experts.b, experts)
            asked.append((ranks * dranks).float().sum(-1) if x is None else every_expert(experts, x, dy))
            dx = dy @ routed.linear.weight if dx is None else dx.addmm_(dy, routed.linear.weight)
            return by.expand_(dx, dranks, experts.a, experts)

        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = mlp.act_fn(gate)
        x, hidden = (None, None) if ctx.selected else (by.sort(last), activated.detach() * up)
        dhidden = back(mlp.down_proj, by.sort(dy), down_ranks, hidden)
        (dgate,) = torch.autograd.grad(activated, gate, dhidden * up)
        dx = back(mlp.gate_proj, dgate, gate_ranks, x)
        dx = back(mlp.up_proj, dhidden * activated.detach(), up_ranks, x, dx)
        dweights = by.unsort(torch.stack(asked).sum(0))
        if ctx.selected:
            dweights = dweights.new_zeros(ctx.shape).scatter_(1, last, dweights[:, None])
        return by.unsort(dx), dweights, None, None, None


def every_expert(experts: PackedExperts, x: Tensor, dy: Tensor) -> Tensor:
    """⟨A_e x, s_e B_eᵀ dy⟩ for every expert, (tokens, experts) float32."""
    both = (x @ experts.a.T.to(x.dtype)) * (dy @ experts.b.T.to(x.dtype))
    return both.float() @ experts.members.T


def sorter(mlp: Any, x: Tensor, decision: RoutingDecision) -> Loop | Grouped | None:
    """How the tokens of a hard decision are multiplied with their experts; None where neither way serves."""
    if x.device.type == "cpu":
        return Loop(decision)
    linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return Grouped(decision) if all(Grouped.serves(linear.experts) for linear in linears) else None


class Loop:
    """Products of tokens sorted by expert with their own expert's rows, one expert after the other."""

    def __init__(self, decision: RoutingDecision) -> None:
        self.tokens, self.parts = decision.segments.tokens, decision.segments.parts

    def sort(self, x: Tensor) -> Tensor:
        return x if self.tokens is None else x.index_select(0, self.tokens)

    def unsort(self, y: Tensor) -> Tensor:
        return y if self.tokens is None else torch.empty_like(y).index_copy_(0, self.tokens, y)

    def add_(self, y: Tensor, x: Tensor, experts: PackedExperts) -> Tensor:
        """y += B A x."""
        for expert, start, stop in self.parts:
            a, b = experts.each[expert]
            if self.tokens is None:
                return add_update_(y, x, a, b)
            add_update_(y[start:stop], x[start:stop], a, b)
        return y

    def shrink(self, x: Tensor, rows: Tensor, experts: PackedExperts) -> Tensor:
        """x times its expert's rows, (tokens, ranks); fewer ranks leave zeros."""
        z = x.new_zeros(len(x), max(experts.ranks))
        for expert, start, stop in self.parts:
            first, last = experts.offsets[expert : expert + 2]
            torch.mm(x[start:stop], rows[first:last].T.to(x.dtype), out=z[start:stop, : last - first])
        return z

    def expand_(self, y: Tensor, z: Tensor, rows: Tensor, experts: PackedExperts) -> Tensor:
        """y += z times its expert's rows."""
        for expert, start, stop in self.parts:
            first, last = experts.offsets[expert : expert + 2]
            y[start:stop].addmm_(z[start:stop, : last - first], rows[first:last].to(y.dtype))
        return y


class Grouped:
    """The same by `grouped_mm`: one launch each, and no question to the device."""

    @staticmethod
    def serves(experts: PackedExperts) -> bool:
        """Equal ranks, in steps of 16 bytes."""
        (rank, *others) = set(experts.ranks)
        return not others and rank > 0 and rank % 8 == 0

    def __init__(self, decision: RoutingDecision) -> None:
        self.tokens = decision.choice.reshape(-1).argsort(stable=True)
        tokens = decision.weights.detach().reshape(-1, decision.weights.shape[-1])
        self.ends = tokens.sum(0).cumsum(0).to(torch.int32)  # where each expert's tokens end

    def sort(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.tokens)

    def unsort(self, y: Tensor) -> Tensor:
        return torch.empty_like(y).index_copy_(0, self.tokens, y)

    def add_(self, y: Tensor, x: Tensor, experts: PackedExperts) -> Tensor:
        return self.expand_(y, self.shrink(x, experts.a, experts), experts.b, experts)

    def shrink(self, x: Tensor, rows: Tensor, experts: PackedExperts) -> Tensor:
        z: Tensor = functional.grouped_mm(x, rows.unflatten(0, (len(experts.ranks), -1)).mT, offs=self.ends)
        return z

    def expand_(self, y: Tensor, z: Tensor, rows: Tensor, experts: PackedExperts) -> Tensor:
        return y.add_(functional.grouped_mm(z, rows.unflatten(0, (len(experts.ranks), -1)), offs=self.ends))
