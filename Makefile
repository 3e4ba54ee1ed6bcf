# One-line wrappers; the work is in xtask/.
.PHONY: build test lab
build: ; cargo xtask build
test: ; cargo xtask test
lab: ; cargo xtask lab -- $(CMD)
