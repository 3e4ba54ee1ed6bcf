//! Prints the API's description, for tools that make something of it: `cargo run -p zygote-server --example api`.

fn main() {
    println!("{:#}", zygote_server::document());
}
