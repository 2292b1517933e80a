"""Speed up Triton's interpreter."""

from types import SimpleNamespace


def patch_language_once_per_launch():
    """Keep the interpreter from patching Triton's language at each call of a function inside a kernel.

    This takes a third of its time. Once per launch and per module that defines such functions is enough.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    def patch_once(function):
        if id(function.__globals__) in patched:
            return SimpleNamespace(restore=lambda: None)
        patched.add(id(function.__globals__))
        return patch(function)

    def launch_once(self, *args, **kwargs):
        # The end of a launch undoes the patches, also those of launches in other threads.
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_once
