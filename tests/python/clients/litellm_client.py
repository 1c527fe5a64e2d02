"""LiteLLM, by its providers for OpenAI's and DeepSeek's APIs."""
import json
import sys

import kit
import litellm
import pydantic

litellm.suppress_debug_info = True


def _ask(node, provider="openai", **more):
    request = dict(messages=kit.MESSAGES, max_tokens=30, temperature=0, api_key="unused", num_retries=0)
    base = node.base_url if provider != "deepseek" else node.url + "/beta"
    return litellm.completion(**(request | dict(model=f"{provider}/{node.model}", api_base=base) | more))


def a_chat_is_the_same_whole_and_streamed_by_both_providers(node):
    whole = _ask(node)
    text = whole.choices[0].message.content
    assert "Paris" in text and whole.choices[0].finish_reason == "stop", whole
    assert 0 < whole.usage.prompt_tokens and 0 < whole.usage.completion_tokens <= 30, whole
    for provider in ("openai", "deepseek"):
        assert _ask(node, provider).choices[0].message.content == text
        chunks = list(_ask(node, provider, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
        rebuilt = litellm.stream_chunk_builder(chunks, messages=kit.MESSAGES)
        assert rebuilt.choices[0].message.content == text and rebuilt.choices[0].finish_reason == "stop", rebuilt
        assert rebuilt.usage.completion_tokens == whole.usage.completion_tokens, rebuilt


def a_text_is_completed(node):
    request = dict(model=f"text-completion-openai/{node.model}", prompt="The capital of France is", max_tokens=8, temperature=0,
                   api_base=node.base_url, api_key="unused")
    whole = litellm.text_completion(**request)
    text = "".join(c.choices[0].text or "" for c in litellm.text_completion(**request, stream=True))
    assert "Paris" in whole.choices[0].text and text == whole.choices[0].text, (whole, text)


def a_call_that_is_named_comes_whole_and_streamed_and_its_result_is_taken(node):
    messages = [{"role": "user", "content": kit.WEATHER_QUESTION}]
    choice = {"type": "function", "function": {"name": "get_weather"}}
    request = dict(messages=messages, tools=[kit.WEATHER], tool_choice=choice, parallel_tool_calls=False, max_tokens=100)
    whole = _ask(node, **request)
    assert whole.choices[0].finish_reason == "tool_calls", whole
    [call] = whole.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and list(json.loads(call.function.arguments)) == ["city"], whole
    rebuilt = litellm.stream_chunk_builder(list(_ask(node, **request, stream=True)))
    [streamed] = rebuilt.choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments, rebuilt
    messages += [whole.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "21 C, sunny"}]
    answer = _ask(node, messages=messages, tools=[kit.WEATHER])
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls"), answer


def an_answer_follows_the_schema_of_a_class(node):
    class City(pydantic.BaseModel, extra="forbid"):
        name: str = pydantic.Field(max_length=20)
        population: int = pydantic.Field(ge=0, le=99_999_999)

    answer = _ask(node, messages=[{"role": "user", "content": kit.CITY_QUESTION}], response_format=City, max_tokens=200)
    City.model_validate_json(answer.choices[0].message.content)
    answer = _ask(node, response_format={"type": "json_object"}, max_tokens=300)
    assert answer.choices[0].message.content.startswith("{"), answer


def errors_are_the_classes_of_the_client(node):
    error = kit.fails(litellm.NotFoundError, lambda: _ask(node, model="openai/absent"))
    assert error.status_code == 404 and "absent" in str(error), error
    kit.fails(litellm.BadRequestError, lambda: _ask(node, temperature=9))


def a_context_that_overflows_is_told_and_falls_back(node):
    long = [{"role": "user", "content": kit.LONG}]
    for provider in ("openai", "deepseek"):
        kit.fails(litellm.ContextWindowExceededError, lambda: _ask(node, provider, messages=long))
        kit.fails(litellm.ContextWindowExceededError, lambda: list(_ask(node, provider, messages=long, stream=True)))
    params = dict(model=f"openai/{node.model}", api_base=node.base_url, api_key="unused")
    # The same node as the model that would take more: what counts is that it is asked.
    router = litellm.Router(
        model_list=[{"model_name": name, "litellm_params": params} for name in ("small", "large")],
        context_window_fallbacks=[{"small": ["large"]}], num_retries=0)
    error = kit.fails(litellm.ContextWindowExceededError, lambda: router.completion("small", messages=long, max_tokens=8))
    assert "large" in str(error), error


if __name__ == "__main__":
    kit.run(sys.modules["__main__"])
