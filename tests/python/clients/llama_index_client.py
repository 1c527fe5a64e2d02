"""llama-index, by its model for servers that are like OpenAI's."""
import sys

import kit
import openai
import pydantic
from llama_index.core.llms import ChatMessage
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


class City(pydantic.BaseModel, extra="forbid"):
    """A city."""

    name: str = pydantic.Field(max_length=20)
    population: int = pydantic.Field(ge=0, le=99_999_999)


def _llm(node, **more):
    return OpenAILike(**(dict(model=node.model, api_base=node.base_url, api_key="unused", is_chat_model=True,
                              is_function_calling_model=True, context_window=4096, max_tokens=30, temperature=0,
                              max_retries=0) | more))


def a_chat_is_the_same_whole_and_streamed(node):
    messages = [ChatMessage(role="user", content=kit.QUESTION)]
    whole = _llm(node).chat(messages).message.content
    assert "Paris" in whole, whole
    *_, last = _llm(node).stream_chat(messages)
    assert last.message.content == whole, last


def a_text_is_completed_whole_and_streamed(node):
    llm = _llm(node, is_chat_model=False, max_tokens=8)
    whole = llm.complete("The capital of France is").text
    assert "Paris" in whole, whole
    assert "".join(chunk.delta for chunk in llm.stream_complete("The capital of France is")) == whole


def a_call_that_is_required_comes_whole_and_streamed(node):
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return f"21 C in {city}"

    llm = _llm(node, max_tokens=100)
    tool = FunctionTool.from_defaults(get_weather)
    request = dict(user_msg=kit.WEATHER_QUESTION, tool_required=True, allow_parallel_tool_calls=False)
    whole = llm.chat_with_tools([tool], **request)
    [call] = llm.get_tool_calls_from_response(whole)
    assert (call.tool_name, list(call.tool_kwargs)) == ("get_weather", ["city"]), whole
    *_, last = llm.stream_chat_with_tools([tool], **request)
    [streamed] = llm.get_tool_calls_from_response(last)
    assert streamed.tool_kwargs == call.tool_kwargs, last
    result = ChatMessage(role="tool", content=get_weather(**call.tool_kwargs), additional_kwargs={"tool_call_id": call.tool_id})
    answer = llm.chat([ChatMessage(role="user", content=kit.WEATHER_QUESTION), whole.message, result])
    assert answer.message.role == "assistant", answer


def structured_output_is_an_object_of_its_class(node):
    llm = _llm(node, max_tokens=200)
    program = FunctionCallingProgram.from_defaults(output_cls=City, llm=llm, prompt_template_str=kit.CITY_QUESTION,
                                                   tool_required=True, allow_parallel_tool_calls=False)
    assert isinstance(program(), City)
    city = llm.as_structured_llm(City).complete(kit.CITY_QUESTION).raw
    assert isinstance(city, City), city


def errors_are_the_classes_of_the_client(node):
    messages = [ChatMessage(role="user", content=kit.QUESTION)]
    kit.fails(openai.NotFoundError, lambda: _llm(node, model="absent").chat(messages))
    error = kit.fails(openai.BadRequestError, lambda: _llm(node).chat([ChatMessage(role="user", content=kit.LONG)]))
    assert error.code == "context_length_exceeded", error


if __name__ == "__main__":
    kit.run(sys.modules["__main__"])
