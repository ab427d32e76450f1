from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hqqplus.calibration import moments as module
from hqqplus.calibration.moments import SecondMoment, observe_inputs


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class TestSecondMoment:
    @given(st.integers(1, 9), st.lists(st.integers(0, 7), min_size=1, max_size=4), st.booleans(), st.integers(0, 99))
    def test_is_the_mean_of_the_outer_products(self, width: int, tokens: list[int], full: bool, seed: int) -> None:
        batches = [random(n, 2, width, seed=seed + n) for n in tokens]
        moment = SecondMoment(width, full, dtype=torch.float64)
        for batch in batches:
            moment.update(batch)
        rows = torch.cat(batches).view(-1, width).double()
        assert moment.count == len(rows)
        if len(rows) == 0:
            with pytest.raises(ValueError, match="has seen no token"):
                _ = moment.diagonal
            return
        expected = rows.t() @ rows / len(rows)
        torch.testing.assert_close(moment.diagonal, expected.diagonal())
        if full:
            torch.testing.assert_close(moment.matrix, expected)

    def test_products_of_16_bit_floats_are_added_up_in_float32(self) -> None:
        x = random(4096, 8, dtype=torch.bfloat16)
        moment = SecondMoment(8)
        for batch in x.split(64):
            moment.update(batch)
        expected = x.double().t() @ x.double() / len(x)
        assert moment.matrix.dtype == torch.float32
        torch.testing.assert_close(moment.matrix.double(), expected, atol=1e-6, rtol=1e-6)

    def test_masked_tokens_do_not_count(self) -> None:
        x, mask = random(3, 5, 4), random(3, 5, seed=1) > 0
        x[~mask] = torch.nan  # padding may hold anything
        moment, expected = SecondMoment(4), SecondMoment(4)
        moment.update(x, mask.long())
        expected.update(x[mask])
        assert moment.count == int(mask.sum())
        torch.testing.assert_close(moment.matrix, expected.matrix)

    def test_chunks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole, cut = SecondMoment(4, dtype=torch.float64), SecondMoment(4, dtype=torch.float64)
        whole.update(random(50, 4))
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 12)
        cut.update(random(50, 4))
        torch.testing.assert_close(whole.matrix, cut.matrix)

    @pytest.mark.parametrize("full", [True, False])
    def test_merge(self, full: bool) -> None:
        parts = [SecondMoment(4, full), SecondMoment(4, full), SecondMoment(4, full)]
        whole = SecondMoment(4, full)
        for part, x in zip(parts, (random(5, 4), random(3, 4, seed=1)), strict=False):
            part.update(x)
            whole.update(x)
        before = parts[1].diagonal
        total = SecondMoment(4, full)
        for part in (parts[2], parts[0], parts[1]):
            total.merge(part)
        assert total.count == whole.count == 8
        torch.testing.assert_close(total.diagonal, whole.diagonal)
        torch.testing.assert_close(parts[1].diagonal, before)
        with pytest.raises(ValueError, match="cannot be merged"):
            total.merge(SecondMoment(4, not full))

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match=r"expected floats \[\.\.\., 4\]"):
            SecondMoment(4).update(random(2, 3))
        with pytest.raises(ValueError, match="does not fit tokens"):
            SecondMoment(4).update(random(2, 3, 4), torch.ones(3, 2))
        with pytest.raises(ValueError, match="no more than the diagonal"):
            _ = SecondMoment(4, full=False).matrix
        with pytest.raises(ValueError, match="bfloat16"):
            SecondMoment(4, dtype=torch.bfloat16)
        moment = SecondMoment(4)
        moment.update(torch.full((1, 4), 1e30))
        with pytest.raises(ValueError, match="too large"):
            _ = moment.matrix


class Pair(nn.Module):
    """Two layers on one input, or on one and its double."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)
        self.apart = False

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.first(x) + self.second(input=2 * x if self.apart else x))


class TestObserving:
    def test_layers_that_read_the_same_tensor_share_a_moment(self) -> None:
        model = Pair()
        with observe_inputs(model, ["first", "second", "third"], dtype=torch.float64) as moments:
            for seed in range(3):
                model(random(2, 5, 4, seed=seed))
        assert moments["first"] is moments["second"]
        assert moments["first"].count == moments["third"].count == 30
        x = torch.cat([random(2, 5, 4, seed=seed) for seed in range(3)]).view(-1, 4).double()
        torch.testing.assert_close(moments["first"].matrix, x.t() @ x / 30)
        model(random(2, 5, 4))
        assert moments["first"].count == 30  # no hook is left

    def test_layers_with_inputs_of_their_own_do_not(self) -> None:
        model = Pair()
        model.apart = True
        with observe_inputs(model, ["first", "second"], full=False) as moments:
            model(random(5, 4))
        torch.testing.assert_close(moments["second"].diagonal, 4 * moments["first"].diagonal)

    def test_layers_that_part_ways_are_noticed(self) -> None:
        model = Pair()
        with observe_inputs(model, ["first", "second"], full=False) as moments:
            model(random(5, 4))
            model.apart = True
            with pytest.raises(RuntimeError, match="first and second were given the same tensor"):
                model(random(5, 4))
        model.apart = False
        with observe_inputs(model, ["first", "second"], full=False, share=False) as moments:
            model(random(5, 4))
            model.apart = True
            model(random(5, 4))
        torch.testing.assert_close(moments["second"].diagonal, 2.5 * moments["first"].diagonal)

    def test_a_layer_that_joins_later_gets_a_moment_of_its_own(self) -> None:
        model = Pair()
        with observe_inputs(model, ["first", "second"], full=False) as moments:
            model.first(random(5, 4))
            model(random(5, 4, seed=1))
        assert (moments["first"].count, moments["second"].count) == (10, 5)

    def test_masks_and_refusals(self) -> None:
        model, mask = Pair(), torch.tensor([1, 1, 0, 0, 1])
        with observe_inputs(model, ["first", "second"], mask=lambda: mask) as moments:
            model(random(5, 4))
        assert moments["second"].count == 3
        with pytest.raises(ValueError, match="is a Pair, no linear layer"), observe_inputs(model, [""]):
            pass

    def test_a_block_of_a_llama(self, random_model: Callable[..., Path]) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(random_model("llama"))
        names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "layers" in name]
        kept: dict[str, list[Tensor]] = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: kept[name].append(args[0]))
        ids = torch.arange(3, 67).view(4, 16)
        with torch.no_grad(), observe_inputs(model, names, dtype=torch.float64) as moments:
            model(ids)
            model(ids + 5)
        # Of seven layers of a block q, k, v and gate, up go together.
        assert len({id(moment) for moment in moments.values()}) == 4 * model.config.num_hidden_layers
        for name in names:
            x = torch.cat(kept[name]).flatten(0, -2).double()
            torch.testing.assert_close(moments[name].matrix, x.t() @ x / len(x), atol=1e-7, rtol=1e-5)
