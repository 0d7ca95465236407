// trace_processor.js FOLDER: runs the trace_processor.wasm of Perfetto's UI, which is in that
// folder, in node. A TraceProcessorRpcStream goes in at stdin, one comes out at stdout.
"use strict";
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const folder = path.resolve(process.argv[2]);
const replies = [];
const port = { postMessage: (data) => replies.push(Buffer.from(data)) };
const node = globalThis.process;

function fail(error) {
  console.error(String(error).slice(0, 500));
  node.exit(1);
}

// What the bundle finds in a browser's worker.
globalThis.self = globalThis;
globalThis.WorkerGlobalScope = {};
globalThis.importScripts = () => {};
globalThis.location = { href: "file://" + folder + "/engine_bundle.js" };
globalThis.XMLHttpRequest = class {
  open(_method, url) {
    this.file = path.join(folder, path.basename(url));
  }
  send() {
    const data = fs.readFileSync(this.file);
    this.response = data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength);
    this.status = 200;
    if (this.onload) this.onload();
  }
};
console.log = console.error; // stdout is the answer's
delete globalThis.process; // else it takes this for node proper, which it was not built for

node.on("uncaughtException", fail);
node.on("unhandledRejection", fail);
try {
  vm.runInThisContext(fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf8"));
  globalThis.onmessage({ data: port });
} catch (error) {
  fail(error);
}

const request = new Uint8Array(fs.readFileSync(0));
const begun = Date.now();
function send() {
  try {
    port.onmessage({ data: request });
  } catch (error) {
    // It is being compiled still: nothing was taken.
    if (replies.length || Date.now() - begun > 60000) fail(error);
    setTimeout(send, 20);
    return;
  }
  node.stdout.write(Buffer.concat(replies), () => node.exit(0));
}
setTimeout(send, 20); // promises come first: where requests are to lie
