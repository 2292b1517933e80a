"""Qwen3-Coder's format, whose tool calls are tags."""

import json

import regex

from nanovllm.server.parsers.output_parser import SPACE, OutputParser, Reader
from nanovllm.server.schemas import as_json


class Qwen3CoderParser(OutputParser):
    """Reads `<tool_call><function=f><parameter=key>value</parameter>...</function></tool_call>`.

    A value is JSON where the function's schema says so, else text. It ends at the end tag that is followed by
    another tag, so a value may have such a tag inside.
    """

    call_start = regex.compile("<tool_call>|<function=")
    function = regex.compile(
        rf"(?:<tool_call>{SPACE})?<function=([^>\s]{{1,128}})>{SPACE}(?=<parameter=|</function>|</tool_call>)"
    )
    parameter = regex.compile(rf"{SPACE}<parameter=([^>\n]{{1,256}})>")
    line_break = regex.compile(r"\n")
    end_parameter = regex.compile(rf"\n?</parameter>(?={SPACE}(?:<parameter=|</function>|</tool_call>))")
    end_function = regex.compile(rf"{SPACE}</function>")
    end_call = regex.compile(rf"{SPACE}</tool_call>")

    def _call(self) -> Reader[bool]:
        head = yield from self._match(self.function)
        if not head or head[1] not in self.tools:
            return False
        self._start_call(head[1], head.end())
        yield from self._parameters(head[1])
        is_complete = False
        # The client must see that a call without an end tag is not complete.
        for end in (self.end_function, self.end_call):
            if (yield from self._skip(end)) and not is_complete:
                self._emit_arguments("}")
                is_complete = True
        yield from self._end_call()
        return True

    def _parameters(self, name: str) -> Reader[None]:
        self._emit_arguments("{")
        separator = ""
        while parameter := (yield from self._match(self.parameter)):
            self._position = parameter.end()
            yield from self._skip(self.line_break)
            self._emit_arguments(f"{separator}{_json(parameter[1])}: ")
            separator = ", "
            types = self.tools.value_types(name, parameter[1])
            if types == {"string"}:
                yield from self._text_value()
            else:
                yield from self._json_value(types)

    def _text_value(self) -> Reader[None]:
        self._emit_arguments('"')
        if (yield from self._emit_until(self.end_parameter, lambda text: self._emit_arguments(_json(text)[1:-1]))):
            yield from self._skip(self.end_parameter)
            self._emit_arguments('"')

    def _json_value(self, types: set[str]) -> Reader[None]:
        pieces: list[str] = []
        is_complete = yield from self._emit_until(self.end_parameter, pieces.append)
        text = "".join(pieces)
        if is_complete:
            yield from self._skip(self.end_parameter)
            text = as_json(text, types)
        self._emit_arguments(text)


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
