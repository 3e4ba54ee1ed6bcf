// The package as it is installed, or as it was built here.

const from = process.env.ZYGOTE_TEST_PACKAGE ?? "../dist/esm";
export const errors = await import(`${from}/index.js`);
export const { Client } = errors;
export const { local, overSocket } = await import(`${from}/node.js`);
