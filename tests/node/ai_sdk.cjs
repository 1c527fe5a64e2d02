// AI SDK, by its provider for servers that are like OpenAI's.
const assert = require("node:assert/strict");
const { APICallError, generateObject, generateText, jsonSchema, stepCountIs, streamObject, streamText, tool } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { z } = require("zod");
const kit = require("./kit.cjs");

// Otherwise warnings of the package go to the same output as the suite's words.
globalThis.AI_SDK_LOG_WARNINGS = false;

const provider = (node) => createOpenAICompatible({
  name: "dsd", baseURL: node.baseURL, apiKey: "unused", includeUsage: true, supportsStructuredOutputs: true,
});
const ask = (node, more) => ({
  model: provider(node)(node.model), prompt: kit.QUESTION, maxOutputTokens: 30, temperature: 0, maxRetries: 0, ...more,
});
const City = z.strictObject({ name: z.string().max(20), population: z.int().min(0).max(99999999) });

async function aChatIsTheSameWholeAndStreamed(node) {
  const whole = await generateText(ask(node));
  assert.match(whole.text, /Paris/);
  assert.equal(whole.finishReason, "stop");
  const stream = streamText(ask(node));
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, whole.text);
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
}

async function aTextIsCompleted(node) {
  const model = provider(node).completionModel(node.model);
  const { text } = await generateText({ ...ask(node), model, prompt: "The capital of France is", maxOutputTokens: 8 });
  assert(text.length, text);
}

async function aToolThatIsRequiredIsCalledAndItsResultIsTaken(node) {
  const asked = [];
  const get_weather = tool({
    description: "Weather of a city.", inputSchema: jsonSchema(kit.WEATHER_SCHEMA),
    execute: async ({ city }) => { asked.push(city); return `21 C in ${city}`; },
  });
  const request = ask(node, {
    prompt: kit.WEATHER_QUESTION, tools: { get_weather }, maxOutputTokens: 200, stopWhen: stepCountIs(2),
    // Required first; what came of it is answered in words.
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? { type: "tool", toolName: "get_weather" } : "none" }),
  });
  const whole = await generateText(request);
  assert.equal(whole.steps.length, 2);
  assert.equal(whole.steps[0].toolCalls[0].toolName, "get_weather");
  assert(asked.length >= 1 && typeof asked[0] === "string", asked);
  const n = asked.length;
  const stream = streamText(request);
  await stream.consumeStream();
  assert.deepEqual(asked.slice(n), asked.slice(0, n));
}

async function anObjectFollowsItsSchemaWholeAndStreamed(node) {
  const request = ask(node, { prompt: kit.CITY_QUESTION, schema: City, maxOutputTokens: 200 });
  const { object } = await generateObject(request);
  City.parse(object);
  const stream = streamObject(request);
  let last;
  for await (const partial of stream.partialObjectStream) last = partial;
  assert.deepEqual(last, object);
  const choice = await generateObject(ask(node, { output: "enum", enum: ["yes", "no"], prompt: "Is Paris in France?" }));
  assert(["yes", "no"].includes(choice.object), choice.object);
}

async function errorsAreTheClassesOfTheClient(node) {
  const unknown = await kit.fails(() => generateText(ask(node, { model: provider(node)("absent") })));
  assert(APICallError.isInstance(unknown), unknown);
  assert.equal(unknown.statusCode, 404);
  const over = await kit.fails(() => generateText(ask(node, { prompt: kit.LONG })));
  assert(APICallError.isInstance(over), over);
  assert.equal(over.statusCode, 400);
  assert.match(over.message, /context/);
}

kit.run([aChatIsTheSameWholeAndStreamed, aTextIsCompleted, aToolThatIsRequiredIsCalledAndItsResultIsTaken,
  anObjectFollowsItsSchemaWholeAndStreamed, errorsAreTheClassesOfTheClient]);
