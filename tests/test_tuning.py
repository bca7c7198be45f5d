"""The kernels' launch parameters: the files that ship, what is chosen of them, and the search that writes them."""

import json
import math

import pytest
import torch

pytest.importorskip("triton")
from tiedmoe_kernels import triton_backend, tune, tuning


class TestConfigurations:
    """The files of tile sizes; whether they compile is `test_compile.py`'s."""

    @pytest.mark.parametrize("path", sorted(tuning.CONFIGS.glob("*.json")), ids=lambda path: path.name)
    def test_every_entry_is_well_formed(self, path):
        content = tuning._read(path)
        entries = content.get("entries") or [e for entries in content["architectures"].values() for e in entries]
        for entry in entries:
            fields = {"kernel", "element_size", "max_rows", *tuning.Config._fields}
            optional = {*tuning.Config._field_defaults}
            assert entry.keys() - optional - {"milliseconds"} == fields - optional
            assert entry["kernel"] in tuning.KERNELS
            assert entry["element_size"] in (2, 4)
            for block in ("block_m", "block_n", "block_k"):
                assert entry[block] >= 16
                assert math.log2(entry[block]).is_integer()

    @pytest.mark.parametrize(
        "arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx90a", "gfx942", "gfx950"]
    )
    def test_every_architecture_has_every_kernel(self, arch, monkeypatch):
        monkeypatch.setattr(tuning, "architecture", lambda: arch)
        monkeypatch.setattr(tuning.triton.knobs.runtime, "interpret", False)
        choose = tuning.choose.__wrapped__
        for kernel in tuning.KERNELS:
            for element_size in (2, 4):
                for rows in (1, 64, 4096):
                    config = choose(kernel, element_size, rows, 2048, 40, True, None)
                    assert config.block_k <= 32  # cut to k = 40
                    assert not config.tma  # 32 does not divide 40

    def test_a_file_of_the_very_gpu_comes_first(self, monkeypatch, tmp_path):
        default = (tuning.CONFIGS / "default.json").read_text()
        (tmp_path / "default.json").write_text(default)
        (tmp_path / "some_gpu_80gb.json").write_text(
            '{"entries": [{"kernel": "rows", "element_size": 2, "max_rows": 64, "block_m": 32, "block_n": 16,'
            ' "block_k": 16, "group_m": 1, "num_warps": 2, "num_stages": 7}]}'
        )
        monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
        monkeypatch.setattr(tuning, "_device_name", lambda index: "Some GPU (80GB)")
        monkeypatch.setattr(tuning, "architecture", lambda: "sm_90")
        tuned = tuning.choose.__wrapped__("rows", 2, 64, 256, 256, True, 0)
        assert (tuned.block_m, tuned.num_stages) == (32, 7)
        assert tuning.choose.__wrapped__("rows", 2, 65, 256, 256, True, 0).num_stages != 7

    @pytest.mark.skipif(torch.cuda.is_available(), reason="tunes CPU tensors, in the interpreter")
    def test_tune_keeps_the_fastest_and_leaves_out_what_fails(self, capsys):
        slow, fast, broken = (tuning.Config(16, 16, block_k, 1, 4, 2) for block_k in (16, 32, 64))
        launched, forced = [], tune.forced

        def watched(kernel, config):
            launched[:] = [config]
            return forced(kernel, config)

        def timer(run):
            if launched == [broken]:
                raise RuntimeError("too large")
            run()
            return {slow: 2.0, fast: 1.0}.get(*launched, 3.0)

        problems = [problem._replace(tokens=3) for problem in tune.PROBLEMS[:4]]
        written = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tune, "forced", watched)
            entries = tune.tune(
                "cpu", tune.TINY, problems, timer, lambda *_: [slow, broken, fast], done=written.append
            )
            with pytest.raises(RuntimeError, match="no configuration of gate_up runs"):
                tune.fastest(problems[0], tune.calls("gate_up", 3, tune.TINY, "cpu")[0], [broken], timer)
        assert [entry["kernel"] for entry in entries] == ["gate_up", "rows", "weight_grad", "decode_gate_up"]
        assert all(tuning.Config(*(entry[f] for f in tuning.Config._fields)) == fast for entry in entries)
        assert [entry["milliseconds"] for entry in entries] == [1.0, 1.0, 1.0, 1.0 / tune._DRAWS]
        assert "left out, does not compile: too large" in capsys.readouterr().out
        assert not tuning.FORCED
        assert [sum("milliseconds" in entry for entry in each) for each in written] == [1, 2, 3, 4]
        assert json.loads(tune.text({"device": "x", "entries": entries})) == {"device": "x", "entries": entries}

    @pytest.mark.skipif(torch.cuda.is_available(), reason="tunes CPU tensors, in the interpreter")
    def test_what_the_clock_leaves_out_keeps_its_default(self, capsys):
        entries = tune.tune("cpu", tune.TINY, tune.TINY_PROBLEMS, seconds=0)
        assert capsys.readouterr().out.count("keeps the default") == len(entries) == len(tune.PROBLEMS)
        for problem, entry in zip(tune.TINY_PROBLEMS, entries):
            config = tune.default(problem, "cpu")
            assert entry["max_rows"] == problem.max_rows
            assert tuning.Config(*(entry[f] for f in tuning.Config._fields)) == config

    def test_launches_that_are_kept_are_recorded_too(self):
        class Kernel(tune.KernelInterface):
            def fn_kernel(self): ...

            fn, calls = fn_kernel, []

            def run(self, *args, grid, warmup, **options):
                self.calls.append((args, grid, options))

        launch = triton_backend._Launch(Kernel(), (1, 2, 3), {"K": 4}, keep=True)
        launch.run = lambda *_: pytest.fail("passed the recording by")
        with tune.recorded() as launches:
            launch(5)
        launches[0].again()
        assert [each.kernel for each in launches] == ["fn"]
        assert Kernel.calls == [((5,), (1, 2, 3), {"K": 4})] * 2

    def test_decoding_is_chosen_by_its_slots(self, monkeypatch):
        asked, choose = [], tuning.choose
        monkeypatch.setattr(tuning, "choose", lambda *key: asked.append(key) or choose(*key))
        x, index, weights = torch.randn(3, 32), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
        pool = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
        triton_backend.forward(x, index, weights, *pool, None, None, None, tune.SPEC, False)
        assert [(kernel, rows) for kernel, _, rows, *_ in asked] == [("decode_gate_up", 8), ("decode_down", 8)]

    def test_a_missing_entry_is_named(self, monkeypatch):
        with pytest.raises(LookupError, match="no entry for kernel 'rows' of 8-byte elements"):
            tuning.choose.__wrapped__("rows", 8, 1, 16, 16, False, None)
