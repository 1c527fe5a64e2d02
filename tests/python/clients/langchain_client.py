"""LangChain, by `langchain-openai` and `langchain-deepseek`."""
import sys

import kit
import openai
import pydantic
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langchain_deepseek import ChatDeepSeek
from langchain_openai import ChatOpenAI, OpenAI


@tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    return f"21 C in {city}"


class City(pydantic.BaseModel, extra="forbid"):
    """A city."""

    name: str = pydantic.Field(max_length=20)
    population: int = pydantic.Field(ge=0, le=99_999_999)


def _chats(node, **more):
    shared = dict(model=node.model, api_key="unused", max_tokens=30, temperature=0, max_retries=0, stream_usage=True) | more
    return [ChatOpenAI(base_url=node.base_url, **shared), ChatDeepSeek(api_base=node.base_url, **shared)]


def a_chat_is_the_same_whole_and_streamed_by_both_packages(node):
    for chat in _chats(node):
        whole = chat.invoke(kit.QUESTION)
        assert "Paris" in whole.content and whole.response_metadata["finish_reason"] == "stop", whole
        assert 0 < whole.usage_metadata["output_tokens"] <= 30, whole
        streamed = None
        for chunk in chat.stream(kit.QUESTION):
            streamed = chunk if streamed is None else streamed + chunk
        assert streamed.content == whole.content, streamed
        assert streamed.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"], streamed


def a_text_is_completed_and_log_probabilities_come(node):
    text = OpenAI(model=node.model, base_url=node.base_url, api_key="unused", max_tokens=8, temperature=0)
    whole = text.invoke("The capital of France is")
    assert "Paris" in whole and "".join(text.stream("The capital of France is")) == whole, whole
    answer = _chats(node)[0].bind(logprobs=True, top_logprobs=2).invoke(kit.QUESTION)
    entries = answer.response_metadata["logprobs"]["content"]
    assert "".join(e["token"] for e in entries) == answer.content and len(entries[0]["top_logprobs"]) == 2, entries


def a_call_that_is_required_comes_whole_and_streamed_and_its_result_is_taken(node):
    for chat in _chats(node, max_tokens=100):
        for choice in ("any", "get_weather"):
            calling = chat.bind_tools([get_weather], tool_choice=choice, parallel_tool_calls=False)
            whole = calling.invoke(kit.WEATHER_QUESTION)
            [call] = whole.tool_calls
            assert call["name"] == "get_weather" and list(call["args"]) == ["city"], whole
            streamed = None
            for chunk in calling.stream(kit.WEATHER_QUESTION):
                streamed = chunk if streamed is None else streamed + chunk
            assert streamed.tool_calls[0]["args"] == call["args"], streamed
        result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
        answer = chat.bind_tools([get_weather]).invoke([HumanMessage(kit.WEATHER_QUESTION), whole, result])
        assert answer.response_metadata["finish_reason"] in ("stop", "length", "tool_calls"), answer


def structured_output_is_an_object_of_its_class_by_every_method(node):
    for chat in _chats(node, max_tokens=300):
        for method in ("function_calling", "json_schema"):
            city = chat.with_structured_output(City, method=method).invoke(kit.CITY_QUESTION)
            assert isinstance(city, City), (method, city)


def errors_are_the_classes_of_the_client(node):
    for chat in _chats(node, model="absent"):
        error = kit.fails(openai.NotFoundError, lambda: chat.invoke(kit.QUESTION))
        assert error.code == "model_not_found", error


def a_context_that_overflows_is_told_and_falls_back(node):
    chat = _chats(node)[0]
    kit.fails(ContextOverflowError, lambda: chat.invoke(kit.LONG))
    kit.fails(ContextOverflowError, lambda: list(chat.stream(kit.LONG)))
    short = RunnableLambda(lambda _: kit.QUESTION) | chat
    guarded = chat.with_fallbacks([short], exceptions_to_handle=(ContextOverflowError,))
    assert "Paris" in guarded.invoke(kit.LONG).content


if __name__ == "__main__":
    kit.run(sys.modules["__main__"])
