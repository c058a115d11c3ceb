"""What an adapted Transformer Engine linear must do; run on the double and on the real one."""

import copy

import pytest
import torch


class TELinearContract:
    """The tests; a subclass gives the fixture `te`: `Linear`, `layers` (our module), `device`."""

    @staticmethod
    def trained(layer):
        with torch.no_grad():
            layer.lora_b.weight.normal_()
        return layer

    def both(self, te, **settings):
        """A base and the two ways to adapt it."""
        base = te.Linear(16, 32, device=te.device, **settings)
        copied = te.layers.TELinearAdapter(base, dim=8)
        patched = te.layers.patch_linear_module(copy.deepcopy(base), dim=8)
        return base, copied, patched

    @pytest.mark.parametrize("bias", [True, False])
    def test_output_is_the_bases_at_init_and_base_plus_branch_after(self, te, bias):
        base, copied, patched = self.both(te, bias=bias)
        x = torch.randn(16, 16, device=te.device)
        for layer in (copied, patched):
            assert isinstance(layer, te.layers.TELinearAdapter) and isinstance(layer, te.Linear)
            assert torch.equal(layer(x), base(x))
            self.trained(layer)
            branch = layer.scale * x @ layer.lora_a.weight.T @ layer.lora_b.weight.T
            torch.testing.assert_close(layer(x), base(x) + branch)

    @pytest.mark.parametrize("bias", [True, False])
    def test_names_are_the_bases_plus_two(self, te, bias):
        base, copied, patched = self.both(te, bias=bias)
        for layer in (copied, patched):
            names = set(layer.state_dict())
            assert names == set(base.state_dict()) | {"lora_a.weight", "lora_b.weight"}
            assert "_extra_state" in names
            trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
            assert trainable == {"lora_a.weight", "lora_b.weight"}

    def test_without_bias_the_bias_stays_an_empty_plain_tensor(self, te):
        _, copied, patched = self.both(te, bias=False)
        for layer in (copied, patched):
            assert layer.use_bias is False and layer.bias.shape == (0,)

    def test_return_bias_gives_the_tuple_with_the_branch_in_its_first_part(self, te):
        base, copied, patched = self.both(te, return_bias=True)
        x = torch.randn(16, 16, device=te.device)
        for layer in (copied, patched):
            self.trained(layer)
            out, bias = layer(x)
            branch = layer.scale * x @ layer.lora_a.weight.T @ layer.lora_b.weight.T
            torch.testing.assert_close(out, base(x)[0] + branch)
            assert torch.equal(bias, base.bias)

    def test_every_argument_of_forward_is_passed_on(self, te):
        base, copied, patched = self.both(te)
        x = torch.randn(16, 16, device=te.device)
        for layer in (copied, patched):
            assert torch.equal(layer(x, is_first_microbatch=True), base(x))
            assert torch.equal(layer(x, True, fp8_grad=False), base(x))

    @pytest.mark.parametrize("autocast", [False, True])
    def test_lora_in_another_dtype_than_the_base_runs(self, te, autocast):
        base = te.Linear(16, 32, params_dtype=torch.bfloat16, device=te.device)
        layer = te.layers.patch_linear_module(base, dim=8, lora_dtype=torch.float32)
        self.trained(layer)
        x = torch.randn(16, 16, device=te.device, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast(te.device, dtype=torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.sum().backward()
        assert y.dtype == torch.bfloat16
        assert layer.lora_a.weight.grad.dtype == torch.float32
        assert {n for n, _ in layer.named_parameters()} >= {"lora_a.weight", "lora_b.weight"}

    def test_gradients_reach_the_branch_and_the_input_only(self, te):
        _, copied, patched = self.both(te)
        for layer in (copied, patched):
            self.trained(layer)
            x = torch.randn(16, 16, device=te.device, requires_grad=True)
            layer(x).sum().backward()
            assert x.grad is not None and layer.lora_a.weight.grad.abs().sum() > 0
            assert layer.lora_b.weight.grad.abs().sum() > 0
            assert layer.weight.grad is None and layer.bias.grad is None

    def test_split_parameters_are_refused_with_the_reason(self, te):
        base = te.Linear(16, 32, parameters_split=("q", "k"), device=te.device)
        for make in (te.layers.patch_linear_module, te.layers.TELinearAdapter):
            with pytest.raises(NotImplementedError, match="parameters_split"):
                make(base)

    def test_a_subclass_of_te_linear_is_refused(self, te):
        class Megatrons(te.Linear):
            pass

        with pytest.raises(NotImplementedError, match="Megatrons: .*wrap it in LoRALinear"):
            te.layers.patch_linear_module(Megatrons(16, 32, device=te.device))

    def test_patching_again_is_refused(self, te):
        _, copied, patched = self.both(te)
        for layer in (copied, patched):
            with pytest.raises(AssertionError, match="already adapted"):
                te.layers.patch_linear_module(layer)

    def test_the_copy_shares_nothing_and_leaves_the_original_trainable(self, te):
        base, copied, _ = self.both(te)
        assert copied.weight.data_ptr() != base.weight.data_ptr()
        assert base.weight.requires_grad and type(base) is te.Linear

    def test_state_dict_round_trips(self, te):
        base, copied, patched = self.both(te)
        self.trained(copied)
        patched.load_state_dict(copied.state_dict())
        x = torch.randn(16, 16, device=te.device)
        assert torch.equal(patched(x), copied(x))
        incompatible = patched.load_state_dict(base.state_dict(), strict=False)
        assert set(incompatible.missing_keys) == {"lora_a.weight", "lora_b.weight"}

    def test_merging_forgets_the_cached_fp8_copies_of_the_weight(self, te):
        layer = self.trained(te.layers.patch_linear_module(te.Linear(16, 16, device=te.device)))
        model = torch.nn.Sequential(layer)
        for step in (te.merging.merge, te.merging.unmerge):
            layer._fp8_workspaces = {"weight": "stale"}
            step(model)
            assert not layer._fp8_workspaces
