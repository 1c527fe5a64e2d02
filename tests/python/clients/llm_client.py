"""The `llm` command, by a model of its file for servers that are like OpenAI's."""
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import kit

MODELS = """
- model_id: chat
  model_name: {model}
  api_base: {base_url}
  api_key_name: dsd
  supports_tools: true
  supports_schema: true
- model_id: text
  model_name: {model}
  api_base: {base_url}
  api_key_name: dsd
  completion: true
- model_id: absent
  model_name: absent
  api_base: {base_url}
  api_key_name: dsd
"""


def _llm(node, *arguments):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / "extra-openai-models.yaml").write_text(MODELS.format(model=node.model, base_url=node.base_url))
        (path / "keys.json").write_text(json.dumps({"dsd": "unused"}))
        return subprocess.run([sys.executable, "-m", "llm", *arguments], env=os.environ | {"LLM_USER_PATH": folder},
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def _says(node, *arguments):
    done = _llm(node, *arguments)
    assert done.returncode == 0, done
    return done.stdout


SHORT = ["-o", "max_tokens", "30", "-o", "temperature", "0"]


def a_chat_is_the_same_whole_and_streamed(node):
    streamed = _says(node, "-m", "chat", *SHORT, kit.QUESTION)
    assert "Paris" in streamed, streamed
    assert _says(node, "-m", "chat", "--no-stream", *SHORT, kit.QUESTION) == streamed


def a_text_is_completed(node):
    text = _says(node, "-m", "text", "-o", "max_tokens", "8", "-o", "temperature", "0", "The capital of France is")
    assert "Paris" in text, text


def an_answer_follows_a_schema(node):
    schema = {"type": "object", "additionalProperties": False, "required": ["name"],
              "properties": {"name": {"type": "string", "maxLength": 20}}}
    text = _says(node, "-m", "chat", "--schema", json.dumps(schema), "-o", "max_tokens", "100", "-o", "temperature", "0",
                 kit.CITY_QUESTION)
    assert list(json.loads(text)) == ["name"], text


def a_tool_may_be_offered(node):
    text = _says(node, "-m", "chat", *SHORT, "--functions", "def get_weather(city: str) -> str:\n    return '21 C'",
                 kit.WEATHER_QUESTION)
    assert text.strip(), text


def an_error_is_told(node):
    done = _llm(node, "-m", "absent", kit.QUESTION)
    assert done.returncode == 1 and "absent" in done.stderr and node.model in done.stderr, done


if __name__ == "__main__":
    kit.run(sys.modules["__main__"])
