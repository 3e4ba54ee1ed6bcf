//! The recipe that a new one begins with.

/// The text of a recipe of that name, with every field explained.
pub fn starter(name: &str) -> String {
    format!(
        r##"# A template: what every sandbox of it starts from. Build it:  zygote template build {name}.toml
name = "{name}"

# Debian packages. apt-cache search numpy
packages = ["python3", "python3-numpy"]

# Packages of the Python Package Index, as pip takes them; or a file of them.
# pip = ["requests>=2.31", "rich"]
# requirements = "requirements.txt"

# Files and folders beside this one: "SOURCE" goes to /root, where programs start; or "SOURCE:DEST".
# files = ["helper.py", "data:/opt/data"]

# Memory and processors of each sandbox.
memory = "512M"
vcpus = 1

# Python that is run once, before the snapshot: what it imports is there in every sandbox.
warm = """
import numpy
"""
"##
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;

    #[test]
    fn it_is_a_good_recipe_and_stays_one_with_each_of_its_hints() {
        let text = starter("mine");
        let recipe = Recipe::parse("mine.toml", &text, None).unwrap();
        assert_eq!((recipe.name.as_str(), recipe.vcpus()), ("mine", 1));
        let hints = ["# pip = ", "# requirements = ", "# files = "];
        for hint in hints {
            assert!(text.contains(hint), "{hint}");
            let text = text.replace(hint, &hint[2..]);
            Recipe::parse("mine.toml", &text, None).unwrap_or_else(|e| panic!("{hint}: {e}"));
        }
    }
}
