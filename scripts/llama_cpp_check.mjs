// Greedy continuations by llama.cpp itself: node llama_cpp_check.mjs MODEL.gguf LORA.gguf|- TOKENS PROMPT...
// One line of JSON for each prompt: its tokens, those that follow, and their text. One thread: others may be at work.
import { getLlama } from "node-llama-cpp";

const [file, lora, count, ...prompts] = process.argv.slice(2);
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
const model = await llama.loadModel({ modelPath: file });
const options = { contextSize: 256, batchSize: 64, threads: 1, ...(lora === "-" ? {} : { lora }) };
for (const prompt of prompts) {
  const context = await model.createContext(options);
  const tokens = model.tokenize(prompt, true);
  const said = [];
  for await (const token of context.getSequence().evaluate(tokens, { temperature: 0 })) {
    said.push(token);
    if (said.length >= Number(count)) break;
  }
  console.log(JSON.stringify({ prompt: tokens, tokens: said, text: model.detokenize(said) }));
  await context.dispose();
}
process.exit(0);
