// agent-backend's TypeScript client: one JSON object a line in, one out; times (ms) are taken here, by node's clock.
// Arguments: the package's entry, then the configuration of its RemoteFilesystemBackend as JSON.
import { createInterface } from 'node:readline'
import { readFileSync, writeFileSync } from 'node:fs'

const [entry, text] = process.argv.slice(2)
const { RemoteFilesystemBackend } = await import(entry)
const config = JSON.parse(text)
if (config.keyFile) {
  config.sshAuth.credentials.privateKey = readFileSync(config.keyFile, 'utf8')
  delete config.keyFile
}
const backend = new RemoteFilesystemBackend(config)

const calls = {
  connect: async () => { await backend.connect?.(); await backend.exec('true') },
  run: async ({ command }) => { await backend.exec(command, { encoding: 'buffer' }) },
  read: async ({ path, local }) => {
    const data = await backend.read(path, { encoding: 'buffer' })
    return () => writeFileSync(local, data)
  },
  write: async ({ path, local }) => {
    const data = readFileSync(local)
    const started = performance.now()
    await backend.write(path, data)
    return performance.now() - started
  },
  many: async ({ command, count, limit }) => {
    let left = count
    let failed = 0
    const some = async () => {
      while (left-- > 0) await backend.exec(command).catch(() => { failed += 1 })
    }
    await Promise.all(Array.from({ length: limit }, some))
    return { failed }
  },
}

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line)
  const answer = {}
  const started = performance.now()
  try {
    const told = await calls[request.call](request)
    answer.ms = typeof told === 'number' ? told : performance.now() - started
    if (typeof told === 'function') told()
    else if (typeof told === 'object') Object.assign(answer, told)
  } catch (error) {
    answer.error = String(error?.message ?? error)
  }
  process.stdout.write(JSON.stringify(answer) + '\n')
}
process.exit(0)
