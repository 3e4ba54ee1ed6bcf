# One-line wrappers; the work is in xtask/.
.PHONY: demo test build setup lab
demo: ; cargo xtask demo
test: ; cargo xtask test
build: ; cargo xtask build
setup: ; cargo xtask setup
lab: ; cargo xtask lab -- $(CMD)
