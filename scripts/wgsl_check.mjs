// Has Tint, Dawn's compiler of WGSL, parse and type shaders: node scripts/wgsl_check.mjs < texts.json, as `make wgsl` does.
// npm's `webgpu` with the null backend needs no GPU. It checks no matrix shape against a device: a test of ours does.
import { readFileSync } from 'node:fs';
import { create, globals } from 'webgpu';

Object.assign(globalThis, globals);
const gpu = create(['backend=null', 'enable-dawn-features=allow_unsafe_apis']); // lives as long as the device
const adapter = await gpu.requestAdapter();
const wanted = ['shader-f16', 'subgroups', 'subgroup-size-control', 'chromium-experimental-subgroup-matrix'];
const device = await adapter.requestDevice({ requiredFeatures: wanted });
const texts = JSON.parse(readFileSync(0, 'utf8'));
let wrong = 0;
for (const [shader, code] of texts) {
  device.pushErrorScope('validation');
  device.createShaderModule({ label: shader, code });
  const error = await device.popErrorScope();
  if (error) {
    wrong += 1;
    console.error(`${shader}: ${error.message}`);
  }
}
console.log(`${texts.length} shaders, ${wrong} that Tint refuses`);
process.exit(wrong || !texts.length ? 1 : 0);
