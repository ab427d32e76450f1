from __future__ import annotations

import dataclasses

import pytest

from hqqplus.quantization import WHOLE_ROW, QuantPlan, QuantSpec
from hqqplus.quantization.spec import matches


class TestQuantSpec:
    @pytest.mark.parametrize("nbits", [1, 2, 3, 4, 8])
    @pytest.mark.parametrize("group_size", [8, 64, 72, 256, WHOLE_ROW])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_valid_values_are_kept(self, nbits: int, group_size: int, axis: int) -> None:
        spec = QuantSpec(nbits, group_size, axis, "bfloat16", 8)
        assert spec.to_dict() == {
            "nbits": nbits,
            "group_size": group_size,
            "axis": axis,
            "metadata_dtype": "bfloat16",
            "metadata_bits": 8,
        }
        assert QuantSpec(**spec.to_dict()) == spec
        assert spec.qmax == 2**nbits - 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"nbits": 0}, r"nbits is 0: .*1, 2, 3, 4, 8"),
            ({"nbits": 5}, r"nbits is 5: .*1, 2, 3, 4, 8"),
            ({"nbits": 16}, r"nbits is 16: .*1, 2, 3, 4, 8"),
            ({"nbits": -1}, r"nbits is -1: .*1, 2, 3, 4, 8"),
            ({"group_size": 0}, r"group_size is 0: .*multiple of 8 from 8 to 256, or -1 for the whole row"),
            ({"group_size": 4}, r"group_size is 4: .*multiple of 8 from 8 to 256"),
            ({"group_size": 60}, r"group_size is 60: .*multiple of 8 from 8 to 256"),
            ({"group_size": 264}, r"group_size is 264: .*multiple of 8 from 8 to 256"),
            ({"group_size": -8}, r"group_size is -8: .*or -1 for the whole row"),
            ({"axis": 2}, r"axis is 2: it must be 0 or 1"),
            ({"axis": -1}, r"axis is -1: it must be 0 or 1"),
            ({"metadata_dtype": "float32"}, r"metadata_dtype is 'float32': .*float16, bfloat16"),
            ({"metadata_dtype": None}, r"metadata_dtype is None: .*float16, bfloat16"),
            ({"metadata_bits": 4}, r"metadata_bits is 4: it must be 8 or 16"),
            ({"metadata_bits": 32}, r"metadata_bits is 32: it must be 8 or 16"),
        ],
    )
    def test_wrong_values_are_refused_with_what_is_allowed(self, change: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            QuantSpec(**change)
        with pytest.raises(ValueError, match=message):
            QuantSpec().replace(**change)

    @pytest.mark.parametrize("name", ["nbits", "group_size", "axis", "metadata_bits"])
    @pytest.mark.parametrize("value", ["2", 2.0, None, True])
    def test_other_types_are_refused(self, name: str, value: object) -> None:
        with pytest.raises(TypeError, match=f"{name} is .*integer"):
            QuantSpec(**{name: value})

    def test_frozen_and_hashable(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            QuantSpec().nbits = 4  # type: ignore[misc]
        assert len({QuantSpec(), QuantSpec(2, 32), QuantSpec(1, 32)}) == 2

    def test_replace_changes_nothing_else(self) -> None:
        spec = QuantSpec(1, 32, 0, "bfloat16", metadata_bits=16)
        assert spec.replace(nbits=4) == QuantSpec(4, 32, 0, "bfloat16", metadata_bits=16)
        assert spec == QuantSpec(1, 32, 0, "bfloat16", metadata_bits=16)


class TestLayout:
    @pytest.mark.parametrize(
        ("spec", "shape", "expected"),  # expected: rows, width, padded, group, groups, plane
        [
            (QuantSpec(2, 64, metadata_bits=16), (96, 128), (96, 128, 128, 64, 2, 64)),
            (QuantSpec(2, 64, axis=0, metadata_bits=16), (96, 128), (128, 96, 128, 64, 2, 64)),
            (QuantSpec(2, 64, metadata_bits=16), (64, 172), (64, 172, 192, 64, 3, 64)),
            (QuantSpec(1, 8, metadata_bits=16), (3, 5), (3, 5, 8, 8, 1, 8)),
            (QuantSpec(2, WHOLE_ROW, metadata_bits=16), (3, 172), (3, 172, 176, 176, 1, 176)),
            (QuantSpec(2, WHOLE_ROW, metadata_bits=16), (3, 256), (3, 256, 256, 256, 1, 256)),
            (QuantSpec(2, WHOLE_ROW, metadata_bits=16), (3, 1000), (3, 1000, 1000, 1000, 1, 128)),
            (QuantSpec(2, WHOLE_ROW, axis=0, metadata_bits=16), (1000, 3), (3, 1000, 1000, 1000, 1, 128)),
        ],
    )
    def test_sizes(self, spec: QuantSpec, shape: tuple[int, int], expected: tuple[int, ...]) -> None:
        assert dataclasses.astuple(spec.layout(*shape)) == expected

    @pytest.mark.parametrize("nbits", [1, 2, 3, 4, 8])
    @pytest.mark.parametrize("group_size", [8, 32, 64, 128])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_bits_per_weight_is_the_formula_where_the_group_divides(
        self, nbits: int, group_size: int, axis: int
    ) -> None:
        assert (
            QuantSpec(nbits, group_size, axis, metadata_bits=16).bits_per_weight(256, 384) == nbits + 32 / group_size
        )
        eight = QuantSpec(nbits, group_size, axis, metadata_bits=8).bits_per_weight(256, 384)
        assert eight == nbits + 16 / group_size + 64 / (128 * group_size)

    def test_bits_per_weight_of_the_design(self) -> None:
        assert QuantSpec(1, 8, metadata_bits=16).bits_per_weight(4096, 4096) == 5.0
        assert QuantSpec(2, 64, metadata_bits=16).bits_per_weight(4096, 4096) == 2.5

    def test_padding_is_paid_for(self) -> None:
        assert QuantSpec(2, 64, metadata_bits=16).bits_per_weight(64, 172) == (192 * 2 + 3 * 32) / 172
        assert QuantSpec(1, WHOLE_ROW, metadata_bits=16).bits_per_weight(10, 4096) == 1 + 32 / 4096

    def test_a_block_that_is_not_full_is_paid_for_whole(self) -> None:
        spec = QuantSpec(2, 64, metadata_bits=8)
        assert spec.bits_per_weight(64, 172) == (64 * (192 * 2 + 3 * 16) + 2 * 64) / (64 * 172)  # 192 groups
        assert spec.bits_per_weight(1, 64) == 2 + 16 / 64 + 64 / 64


class TestMatches:
    @pytest.mark.parametrize(
        ("pattern", "hit"),
        [
            ("model.layers.0.mlp.down_proj", True),
            ("down_proj", True),
            ("mlp.down_proj", True),
            ("*.down_proj", True),
            ("*.layers.0.*", True),
            ("model.layers.[01].*", True),
            ("*", True),
            ("proj", False),
            ("own_proj", False),
            ("model.layers.0", False),
            ("*.layers.1.*", False),
            ("MLP.down_proj", False),
            ("", False),
        ],
    )
    def test_globs_and_trailing_parts(self, pattern: str, hit: bool) -> None:
        assert matches("model.layers.0.mlp.down_proj", pattern) is hit

    def test_a_name_without_dots(self) -> None:
        assert matches("lm_head", "lm_head")
        assert not matches("lm_head", "head")
        assert not matches("lm_head", "*.lm_head")


class TestQuantPlan:
    def test_the_default_is_for_every_linear_layer_but_for_nothing_else(self) -> None:
        plan = QuantPlan(QuantSpec(1, 32, metadata_bits=16))
        assert plan.spec_for("a.q_proj") == QuantSpec(1, 32, metadata_bits=16)
        assert plan.override_for("a.q_proj") is None

    def test_an_override_changes_only_its_fields(self) -> None:
        plan = QuantPlan(QuantSpec(1, 32, metadata_bits=16), overrides={"*.down_proj": {"nbits": 4}})
        assert plan.spec_for("model.layers.3.mlp.down_proj") == QuantSpec(4, 32, metadata_bits=16)
        assert plan.override_for("model.layers.3.mlp.down_proj") == QuantSpec(4, 32, metadata_bits=16)
        assert plan.spec_for("model.layers.3.mlp.up_proj") == QuantSpec(1, 32, metadata_bits=16)

    def test_the_last_match_wins_alone(self) -> None:
        overrides = {"*.mlp.*": {"nbits": 3, "group_size": 16}, "down_proj": {"nbits": 4}, "other": {"nbits": 8}}
        plan = QuantPlan(QuantSpec(), overrides)
        assert plan.spec_for("a.mlp.down_proj") == QuantSpec(nbits=4)
        assert plan.spec_for("a.mlp.up_proj") == QuantSpec(3, 16)
        turned = QuantPlan(QuantSpec(), dict(reversed(overrides.items())))
        assert turned.spec_for("a.mlp.down_proj") == QuantSpec(3, 16)

    def test_skip_wins_over_overrides(self) -> None:
        plan = QuantPlan(overrides={"lm_head": {"nbits": 8}, "*.q_proj": {"nbits": 4}}, skip=("lm_head", "*.0.*"))
        for name in ("lm_head", "model.layers.0.q_proj", "model.layers.0.k_proj"):
            assert plan.skips(name)
            assert plan.spec_for(name) is None
            assert plan.override_for(name) is None
        assert plan.spec_for("model.layers.1.q_proj") == QuantSpec(nbits=4)

    def test_an_empty_override_names_a_module(self) -> None:
        plan = QuantPlan(QuantSpec(4, metadata_bits=16), overrides={"embed_tokens": {}})
        assert plan.override_for("model.embed_tokens") == QuantSpec(4, metadata_bits=16)

    def test_an_unknown_field_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match=r"override 'q_proj': 'bits' is not one of nbits, group_size, axis"):
            QuantPlan(overrides={"q_proj": {"bits": 4}})

    def test_a_wrong_value_is_refused_with_its_pattern(self) -> None:
        with pytest.raises(ValueError, match=r"override '\*\.q_proj': nbits is 5: .*1, 2, 3, 4, 8"):
            QuantPlan(overrides={"*.q_proj": {"nbits": 5}})
        with pytest.raises(TypeError, match=r"override 'q_proj': group_size is '64'"):
            QuantPlan(overrides={"q_proj": {"group_size": "64"}})

    def test_skip_as_one_string_is_refused(self) -> None:
        with pytest.raises(TypeError, match="skip is 'lm_head': it must be a tuple of patterns"):
            QuantPlan(skip="lm_head")  # type: ignore[arg-type]
