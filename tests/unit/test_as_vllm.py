"""`import nanovllm.as_vllm`: nanovllm's objects under vLLM's names. Each test has a process of its own."""

import os
import subprocess
import sys
import textwrap

from tests.models.tiny import save_tiny


def run(code):
    return run_python("-c", textwrap.dedent(code))


def run_python(*arguments, path=()):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([os.getcwd(), *map(str, path)]))
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_package_does_not_import_it():
    run("""
        import sys, nanovllm
        assert "vllm" not in sys.modules and "nanovllm.as_vllm" not in sys.modules
    """)


def test_all_ways_to_look_for_vllm_find_nanovllms_objects():
    run("""
        import nanovllm, nanovllm.as_vllm
        import importlib.metadata, importlib.util
        import vllm
        from vllm import LLM, SamplingParams, TokensPrompt
        from vllm.sampling_params import StructuredOutputsParams
        import vllm.v1.engine.async_llm

        assert issubclass(LLM, nanovllm.LLM) and SamplingParams is nanovllm.SamplingParams
        assert StructuredOutputsParams is nanovllm.StructuredOutputsParams
        assert issubclass(vllm.v1.engine.async_llm.AsyncLLM, nanovllm.AsyncLLM)
        assert importlib.util.find_spec("vllm") and importlib.util.find_spec("vllm.outputs")
        assert importlib.metadata.version("vllm") == vllm.__version__ == nanovllm.as_vllm.VLLM_VERSION
        assert importlib.metadata.packages_distributions()["vllm"] == ["vllm"]
        assert importlib.metadata.version("numpy")
        assert TokensPrompt(prompt_token_ids=[1, 2])["prompt_token_ids"] == [1, 2]
    """)


def test_sleep_gives_the_weights_back_at_each_level(tmp_path):
    path = save_tiny(tmp_path, "qwen3")
    run(f"""
        import asyncio, pytest
        import nanovllm.as_vllm
        from vllm import LLM
        from vllm.v1.engine.async_llm import AsyncLLM

        with LLM({str(path)!r}, device="cpu", max_model_len=64) as llm:
            for level in (1, 2):
                llm.sleep(level=level)
                assert llm.llm_engine.guard.asleep == {{"weights", "kv_cache"}}
                llm.wake_up()
            with pytest.raises(ValueError, match="level must be"):
                llm.sleep(3)
        llm = AsyncLLM({str(path)!r}, device="cpu", max_model_len=64)
        asyncio.run(llm.sleep())
        assert llm.llm_engine.guard.asleep == {{"weights", "kv_cache"}}
        llm.close()
    """)


def test_chat_templates_are_found_with_and_without_vllms_argument_for_the_model():
    run("""
        import nanovllm.as_vllm
        from types import SimpleNamespace
        from vllm.renderers.hf import resolve_chat_template

        tokenizer = SimpleNamespace(chat_template="own", get_chat_template=lambda given, tools: given or "own")
        assert resolve_chat_template(tokenizer) == "own"
        assert resolve_chat_template(tokenizer, "other", None, model_config=None) == "other"
    """)


def test_what_is_not_here_is_refused_by_name():
    run("""
        import nanovllm.as_vllm
        from vllm.lora.request import LoRARequest

        def error(kind, code):
            try:
                exec(code)
            except kind as raised:
                return str(raised)

        assert "LoRARequest" in error(NotImplementedError, "LoRARequest('a', 1, 'path')")
        assert "vllm.engine" in error(ModuleNotFoundError, "import vllm.engine.arg_utils")
        assert "PoolingParams" in error(ImportError, "from vllm import PoolingParams")
    """)


def test_a_loaded_vllm_is_not_replaced():
    run("""
        import sys, types
        sys.modules["vllm"] = other = types.ModuleType("vllm")
        try:
            import nanovllm.as_vllm
        except ImportError as error:
            assert "before vllm" in str(error)
        else:
            raise AssertionError
        assert sys.modules["vllm"] is other
    """)


def test_a_command_runs_with_the_names(tmp_path):
    command = "import sys, vllm, nanovllm.as_vllm\nprint(vllm.SamplingParams.__module__, __name__, sys.argv[1:])\n"
    (tmp_path / "own_command.py").write_text(command)
    output = run_python("-m", "nanovllm.as_vllm", "own_command", "--flag", path=[tmp_path])
    assert output.split() == ["nanovllm.sampling_params", "__main__", "['--flag']"]


def test_a_command_that_cannot_run_ends_with_one_line():
    commands = {
        "nosuchmodule": "there is no module nosuchmodule",
        "script.py": "script.py is no module: give its name without .py, or import nanovllm.as_vllm",
        "nosuchpackage.x": "No module named 'nosuchpackage'",
        "xml": "there is no module xml that can run",
        "vllm": "The server is `nanovllm serve`",
        "vllm.entrypoints.openai.api_server": "The server is `nanovllm serve`",
    }
    run(f"""
        from nanovllm.as_vllm import _check_command
        for name, message in {commands!r}.items():
            try:
                _check_command(name)
            except SystemExit as end:
                assert message in end.code, (name, end.code)
            else:
                raise AssertionError(name)
    """)


def test_the_last_output_of_async_llm_is_whole_as_in_vllm(tmp_path):
    path = save_tiny(tmp_path, "qwen3")
    run(f"""
        import asyncio
        import nanovllm.as_vllm
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.async_llm import AsyncLLM

        async def main():
            async with AsyncLLM({str(path)!r}, device="cpu", max_model_len=64) as llm:
                for params in (None, SamplingParams(max_tokens=40, ignore_eos=True)):
                    async for output in llm.generate([1, 2, 3], params):
                        last = output
                    assert last.finished and len(last.token_ids) == last.metrics.num_generation_tokens > 1
                parts = []
                delta = SamplingParams(max_tokens=4, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
                async for output in llm.generate([1, 2, 3], delta):
                    parts += output.token_ids
                assert len(parts) == 4

        asyncio.run(main())
    """)
