#!/usr/bin/env python3
"""Drives a node with the official `anthropic` package, unmodified.

    anthropic_client.py BASE_URL MODEL

Runs the functions below; the first failed assertion ends it with a traceback.
"""
import sys

import anthropic

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {"name": "get_weather", "description": "Weather of a city.", "input_schema": {
    "type": "object", "additionalProperties": False, "required": ["city"], "properties": {"city": {"type": "string", "maxLength": 20}}}}
GREEDY = {"temperature": 0}


def an_answer_is_the_same_whole_and_streamed(client, model):
    request = dict(model=model, max_tokens=30, system="Be brief.", messages=QUESTION, extra_body=GREEDY)
    whole = client.messages.create(**request)
    assert whole.stop_reason == "end_turn" and "Paris" in whole.content[0].text, whole
    assert 0 < whole.usage.input_tokens and 0 < whole.usage.output_tokens <= 30, whole
    with client.messages.stream(**request) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text, final
    assert final.stop_reason == "end_turn" and final.usage.output_tokens == whole.usage.output_tokens, final


def a_stop_sequence_is_named(client, model):
    answer = client.messages.create(model=model, max_tokens=30, messages=QUESTION, stop_sequences=["Paris"], extra_body=GREEDY)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "Paris"), answer


def a_call_that_is_required_comes_and_its_result_is_taken(client, model):
    messages = [{"role": "user", "content": "What is the weather in Rome?"}]
    request = dict(model=model, max_tokens=100, tools=[WEATHER], extra_body=GREEDY)
    choice = {"type": "any", "disable_parallel_tool_use": True}
    whole = client.messages.create(**request, messages=messages, tool_choice=choice)
    [call] = whole.content
    assert (whole.stop_reason, call.type, call.name, list(call.input)) == ("tool_use", "tool_use", "get_weather", ["city"]), whole
    with client.messages.stream(**request, messages=messages, tool_choice=choice) as stream:
        final = stream.get_final_message()
    assert final.content[0].input == call.input, final
    messages += [{"role": "assistant", "content": whole.content},
                 {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "21 C, sunny"}]}]
    answer = client.messages.create(**request, messages=messages)
    assert answer.stop_reason in ("end_turn", "max_tokens", "tool_use"), answer


def tokens_are_counted(client, model):
    counted = client.messages.count_tokens(model=model, messages=QUESTION)
    answer = client.messages.create(model=model, max_tokens=1, messages=QUESTION)
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens, (counted, answer)


def errors_are_classes_of_the_client(client, model):
    try:
        client.messages.create(model="absent", max_tokens=1, messages=QUESTION)
        raise AssertionError("no error")
    except anthropic.NotFoundError as error:
        assert error.body["error"]["type"] == "not_found_error", error
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aa"}}
    try:
        client.messages.create(model=model, max_tokens=1, messages=[{"role": "user", "content": [image]}])
        raise AssertionError("no error")
    except anthropic.BadRequestError as error:
        assert "image" in error.body["error"]["message"], error


def main():
    base_url, model = sys.argv[1:]
    client = anthropic.Anthropic(base_url=base_url, api_key="unused")
    for case in (an_answer_is_the_same_whole_and_streamed, a_stop_sequence_is_named, a_call_that_is_required_comes_and_its_result_is_taken,
                 tokens_are_counted, errors_are_classes_of_the_client):
        print(case.__name__, flush=True)
        case(client, model)


if __name__ == "__main__":
    main()
