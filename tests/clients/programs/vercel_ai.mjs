// Vercel's AI SDK, with OpenAI's provider (Responses and chats) and the one for compatible servers.
import assert from 'node:assert/strict';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { embedMany, generateText, isStepCount, streamText, tool } from 'ai';
import { z } from 'zod';

const { MODEL, OPENAI_BASE_URL: baseURL } = process.env;
const openai = createOpenAI({ baseURL, apiKey: 'none' });
const compatible = createOpenAICompatible({ name: 'headstart', baseURL, apiKey: 'none' });
const getWeather = tool({
  description: 'The weather of a city',
  inputSchema: z.object({ city: z.string() }),
  execute: async () => '12 degrees',
});
const settings = {
  prompt: 'What is the weather in Paris?',
  tools: { getWeather },
  stopWhen: isStepCount(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? 'required' : 'none' }),
  providerOptions: {
    openai: { parallelToolCalls: false },
    headstart: { parallel_tool_calls: false },
  },
  maxOutputTokens: 60,
  maxRetries: 0,
};
const models = {
  'OpenAI, Responses': openai(MODEL),
  'OpenAI, chats': openai.chat(MODEL),
  compatible: compatible(MODEL),
};
for (const [name, model] of Object.entries(models)) {
  const whole = await generateText({ ...settings, model });
  assert.equal(whole.steps[0].toolCalls[0].toolName, 'getWeather');
  assert.ok(whole.text, JSON.stringify(whole.steps.at(-1).content));
  const streamed = streamText({ ...settings, model, onError: ({ error }) => { throw error; } });
  let text = '';
  for await (const part of streamed.textStream) text += part;
  assert.equal((await streamed.steps).length, 2);
  assert.ok(text);
  console.log(`${name}: ${text}`);
}
for (const model of [openai.embedding(MODEL), compatible.embeddingModel(MODEL)]) {
  const { embeddings } = await embedMany({ model, values: ['one text', 'another'], maxRetries: 0 });
  assert.equal(embeddings.length, 2);
  console.log(`embeddings: 2 of ${embeddings[0].length} values`);
}
